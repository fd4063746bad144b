"""`benches/first_run.py` and `scripts/carry` with a program that misbehaves: whatever happens, what was learned is kept and said.

    python3 -m unittest discover tests/first_run
"""
import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BENCHES = ROOT / "benches"
sys.dont_write_bytecode = True
sys.path.insert(0, str(BENCHES))
import first_run
import first_run_table
from processes import Wrong

# Of the program alone: all that are quick, and a few.
QUICK = "selftest-matmul,selftest-attention,choices,steps,curve,kernels,attention"
FEW = "selftest-matmul,selftest-attention,attention"


class Case(unittest.TestCase):
    def setUp(self):
        self.scratch = Path(self.enterContext(tempfile.TemporaryDirectory())) if hasattr(self, "enterContext") else self.folder()
        self.out = self.scratch / "out"
        self.pids = self.scratch / "pids"

    def folder(self):
        """As `enterContext` of Python 3.11."""
        kept = tempfile.TemporaryDirectory()
        self.addCleanup(kept.cleanup)
        return Path(kept.name)

    def env(self, misbehave=(), **more):
        faults = json.dumps([{"when": when, "how": how} for when, how in misbehave])
        return dict(os.environ, MISBEHAVE=faults, BENCHES=str(BENCHES), PIDS=str(self.pids), OUT_OF_RUN=str(self.out), **more)

    def words(self, *more, phases=FEW):
        return ["--vitrum", str(HERE / "program.py"), "--out", str(self.out), "--phases", phases, *more]

    def run_here(self, *more, misbehave=(), phases=FEW, torch=False, env=(), limits=(), usual=()):
        """In this process: exit code, record, what was printed. `limits`, `usual`: seconds of a phase's commands."""
        limits, usual = dict(limits), dict(usual)
        quick = [p._replace(each=limits.get(p.name, 300), limit=300, usual=usual.get(p.name, 0.1)) for p in first_run.PHASES]
        find = importlib.util.find_spec
        absent = lambda name: None if name == "torch" and not torch else find(name)
        said = io.StringIO()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            with mock.patch.object(first_run, "PHASES", quick), mock.patch.dict(os.environ, self.env(misbehave, **dict(env))):
                with mock.patch("importlib.util.find_spec", absent), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    code = first_run.main(self.words(*more, phases=phases))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return code, self.record(), said.getvalue()

    def record(self):
        return json.loads((self.out / "first-run.json").read_text())

    def gone(self, *pids):
        """Ended, or about to be reaped by init."""
        until = time.monotonic() + 5
        while time.monotonic() < until and any(running(pid) for pid in pids):
            time.sleep(0.05)
        for pid in pids:
            self.assertFalse(running(pid), f"{pid} still runs")


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class GoodRun(Case):
    def test_every_phase_passes_and_the_table_says_what_was_measured(self):
        code, record, said = self.run_here(phases=QUICK)
        states = {name: phase["state"] for name, phase in record["phases"].items()}
        self.assertEqual(code, 0, said)
        self.assertEqual(set(states.values()), {"passed"})
        self.assertEqual(record["card"], "NVIDIA H100 80GB HBM3")
        self.assertEqual(record["ended"], "by itself")
        whats = [row["what"] for row in record["table"]]
        for what in ("step of B/16, 512: bf16, pruned", "large copy", "attention of B/16, 512 images: backward", "loss curve, farthest from the CPU's"):
            self.assertIn(what, whats)
        self.assertIn("| step of L/16, 256: bf16 ", said)
        self.assertIn("| what ", (self.out / "first-run.md").read_text())
        self.assertIn("This build prints no choices.", said)
        self.assertIn("selftest --device cuda", (self.out / "logs" / "selftest-matmul.log").read_text())

    def test_without_pytorch_its_phases_are_absent_and_nothing_fails(self):
        code, record, _ = self.run_here(phases="steps,peers-attention,peers-eager,peers-compiled,peers-autotune")
        self.assertEqual(code, 0)
        for name in ("torch", "peers-attention", "peers-eager", "peers-compiled", "peers-autotune"):
            self.assertEqual(record["phases"][name]["state"], "absent")
            self.assertIn("no torch", record["phases"][name]["why"])
        self.assertEqual(record["phases"]["steps"]["state"], "passed")

    def test_a_pytorch_that_does_not_start_fails_and_its_peers_are_absent(self):
        broken = self.scratch / "broken"
        (broken / "torch").mkdir(parents=True)
        (broken / "torch" / "__init__.py").write_text("raise ImportError('libcudart is not there')")
        found = mock.patch("importlib.util.find_spec", lambda name: object())
        with found:
            code, record, _ = self.run_here(phases="steps,peers-eager", torch=True, env={"PYTHONPATH": str(broken)})
        self.assertEqual(code, 1)
        self.assertEqual(record["phases"]["torch"]["state"], "failed")
        self.assertIn("libcudart is not there", record["phases"]["torch"]["why"])
        self.assertEqual(record["phases"]["peers-eager"]["state"], "absent")
        self.assertEqual(record["phases"]["steps"]["state"], "passed")

    def test_the_stand_in_is_known_by_its_name_and_takes_small_sizes(self):
        code, record, said = self.run_here(phases="steps", env={"CARD": "Vitrum stand-in GPU"})
        self.assertEqual(code, 0)
        self.assertTrue(record["stand_in"])
        self.assertIn("mu/16", " ".join(record["phases"]["steps"]["commands"][0]["words"]))
        self.assertIn("no time below says anything about a card", said)

    def test_the_phases_of_an_earlier_run_are_part_of_the_table_if_it_was_on_this_card(self):
        self.run_here(phases="steps")
        first, self.out = self.out, self.scratch / "second"
        code, record, _ = self.run_here("--add", str(first / "first-run.json"), phases="kernels")
        self.assertEqual(code, 0)
        self.assertEqual(set(record["phases"]), {"doctor", "steps", "kernels"})
        self.assertIn("step of B/16, 512: bf16", [row["what"] for row in record["table"]])
        self.out = self.scratch / "third"
        _, record, said = self.run_here("--add", str(first / "first-run.json"), phases="kernels", env={"CARD": "NVIDIA H200"})
        self.assertEqual(set(record["phases"]), {"doctor", "kernels"})
        self.assertIn("is left out: its card is NVIDIA H100", said)

    def test_what_failed_in_an_earlier_run_does_not_fail_this_one(self):
        self.run_here(misbehave=[("--filter matmul", "failed_cases"), ("bench", "fail")], phases="selftest-matmul,attention")
        first, self.out = self.out, self.scratch / "second"
        code, record, _ = self.run_here("--add", str(first / "first-run.json"), phases="kernels")
        self.assertEqual((code, set(record["phases"])), (0, {"doctor", "selftest-matmul", "kernels"}))
        self.assertEqual(record["phases"]["selftest-matmul"]["state"], "failed")

    def test_libraries_are_those_of_this_python_behind_what_the_caller_names(self):
        for folder, version in (("cublas", 12), ("cu13", 13)):
            libraries = self.scratch / "nvidia" / folder / "lib"
            libraries.mkdir(parents=True)
            (libraries / f"libcublasLt.so.{version}").touch()
        with mock.patch.object(sys, "path", [str(self.scratch)]), mock.patch.dict(os.environ, LD_LIBRARY_PATH="/first"):
            path = first_run.environment("cache")["LD_LIBRARY_PATH"]
        self.assertEqual(path.split(":"), ["/first", *(str(self.scratch / "nvidia" / name / "lib") for name in ("cu13", "cublas"))])


class BadProgram(Case):
    # A limit that a program hits which hangs at once, and one that leaves it the time to start another.
    SOON, LATER = {"selftest-matmul": 1}, {"selftest-matmul": 10}

    def failed(self, how, when="selftest --device cuda --precision bf16 --filter matmul", phase="selftest-matmul", phases=FEW, limits=()):
        """What a phase says of it; the others have passed, and all of it is in the record."""
        code, record, said = self.run_here(misbehave=[(when, how)], phases=phases, limits=limits)
        self.assertEqual(code, 1, said)
        self.assertIn(f"not passed: {phase}\n", said)
        self.assertEqual(record["ended"], "by itself")
        for name, found in record["phases"].items():
            self.assertEqual(found["state"], "failed" if name == phase else "passed", name)
        self.assertTrue((self.out / "logs" / f"{phase}.log").exists())
        self.assertIn(phase, (self.out / "first-run.md").read_text())
        return record["phases"][phase]["why"]

    def test_one_that_hangs_is_ended_at_its_limit(self):
        self.assertEqual(self.failed("hang", limits=self.SOON), "ended after 1 s, its limit")
        self.assertLess(self.record()["phases"]["selftest-matmul"]["seconds"], 300)

    def test_one_that_hears_no_sigterm_is_killed_with_what_it_has_started(self):
        self.assertIn("its limit", self.failed("hang_deaf", limits=self.LATER))
        self.gone(*map(int, self.pids.read_text().split()))

    def test_what_a_good_one_leaves_running_is_ended(self):
        code, *_ = self.run_here(misbehave=[("doctor", "leave_behind")], phases="doctor")
        self.assertEqual(code, 0)
        self.gone(int(self.pids.read_text()))

    def test_one_that_a_signal_ends_is_named_with_the_signal_and_its_last_words(self):
        self.assertEqual(self.failed("crash"), "ended by SIGSEGV: about to touch what is not there")

    def test_garbage_instead_of_json_is_quoted(self):
        self.assertIn("printed no JSON object but 'Segmentation fault?", self.failed("garbage"))
        self.assertIn("Segmentation fault?", (self.out / "logs" / "selftest-matmul.log").read_text())

    def test_json_that_is_no_object_is_not_taken(self):
        self.assertIn("printed no JSON object", self.failed("list_instead"))

    def test_one_that_exits_with_a_failure_is_named_with_its_last_lines(self):
        self.assertEqual(self.failed("fail"), "exit code 1: error: the driver said no: hint: ask it again")

    def test_one_that_prints_nothing_has_not_passed(self):
        self.assertEqual(self.failed("nothing"), "printed nothing")

    def test_one_that_prints_megabytes_is_ended_and_its_log_stays_small(self):
        for how in ("flood", "flood_stderr"):
            with self.subTest(how):
                self.out = self.scratch / how
                self.assertIn("printed more than 8 MiB", self.failed(how))
        self.assertLess((self.scratch / "flood" / "logs" / "selftest-matmul.log").stat().st_size, 1 << 20)

    def test_other_json_than_expected_is_a_failure_of_that_command_alone(self):
        why = self.failed("other_keys", when="bench --what train --model S/16", phase="choices", phases="selftest-matmul,choices")
        self.assertIn("not as expected: KeyError", why)
        self.assertEqual([row["model"] for row in self.record()["phases"]["choices"]["rows"]], ["B/16", "L/16", "Ti/16"])

    def test_rates_that_are_no_numbers_are_not_taken(self):
        self.assertIn("`img_per_s` is nan", self.failed("not_a_number", when="--what train", phase="choices", phases="selftest-matmul,choices"))

    def test_cases_that_failed_are_kept_though_the_exit_code_is_a_failure(self):
        self.failed("failed_cases")
        [row] = self.record()["phases"]["selftest-matmul"]["rows"]
        self.assertEqual((row["failed"], row["failures"][0]["operation"]), (1, "matmul"))

    def test_without_a_card_the_reason_is_that_of_doctor_and_the_rest_is_tried(self):
        code, record, _ = self.run_here(misbehave=[("doctor", "no_card")], phases="steps")
        self.assertEqual(code, 1)
        self.assertEqual(record["phases"]["doctor"]["why"], "no card is used: the CUDA driver sees no card")
        self.assertEqual(record["phases"]["steps"]["state"], "passed")

    def test_a_curve_that_is_not_the_cpus_fails_with_both(self):
        code, record, _ = self.run_here(phases="curve", env={"FARTHER": "0.2"})
        self.assertEqual(code, 1)
        self.assertIn("the loss is 0.200 from the CPU's", record["phases"]["curve"]["why"])
        [row] = [row for row in record["table"] if row["what"].startswith("loss curve, farthest")]
        self.assertEqual(row["outside"], "above")


class Limits(Case):
    def test_what_does_not_fit_is_named_and_what_was_found_is_kept(self):
        hangs, really = "--model S/16 --batch 1024 --device cuda --rounds 3", first_run.Commands.run

        def run(commands, name, words, *more):
            if hangs in " ".join(words):
                commands.end = time.monotonic() + 0.5
            return really(commands, name, words, *more)

        phases, usual = "selftest-matmul,steps,kernels", {"selftest-matmul": 1000}
        with mock.patch.object(first_run.Commands, "run", run):
            code, record, said = self.run_here(misbehave=[(hangs, "hang")], phases=phases, usual=usual)
        self.assertEqual(code, 1)
        self.assertEqual(record["phases"]["selftest-matmul"]["state"], "skipped")
        self.assertIn("a command usually takes 1000", record["phases"]["selftest-matmul"]["why"])
        steps = record["phases"]["steps"]
        self.assertEqual((steps["state"], len(steps["rows"])), ("cut short", 3))
        self.assertIn("the time of the whole run was up", steps["why"])
        self.assertEqual(record["phases"]["kernels"]["state"], "skipped")
        self.assertIn("step of B/16, 512: bf16", said)

    def test_a_signal_ends_the_command_and_the_record_says_so(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with self.subTest(number.name):
                self.out = self.scratch / number.name
                child = self.start()
                child.send_signal(number)
                said, _ = child.communicate(timeout=120)
                self.assertEqual(child.returncode, 1, said)
                record = self.record()
                self.assertEqual(record["ended"], number.name)
                states = [phase["state"] for phase in record["phases"].values()]
                self.assertEqual(states, ["passed", "interrupted", "interrupted"])
                self.assertIn("| selftest-matmul", said)
                self.gone(*map(int, self.pids.read_text().split()))

    def test_killed_at_once_it_leaves_a_whole_record(self):
        child = self.start()
        child.kill()
        child.communicate()
        for pid in map(int, self.pids.read_text().split()):
            os.kill(pid, signal.SIGKILL)
        record = self.record()
        self.assertEqual({name: phase["state"] for name, phase in record["phases"].items()}, {"doctor": "passed", "selftest-matmul": "running"})
        self.assertIsNone(record["ended"])
        self.assertIn("NVIDIA H100", (self.out / "first-run.md").read_text())

    def test_a_reader_that_has_gone_stops_nothing(self):
        words = [sys.executable, BENCHES / "first_run.py", *self.words()]
        child = subprocess.Popen(words, env=self.env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        child.stdout.close()
        self.assertEqual((child.wait(60), child.stderr.read()), (0, b""))
        child.stderr.close()
        self.assertEqual(self.record()["ended"], "by itself")

    def start(self):
        """One that hangs in its second phase, in a process of its own."""
        env = self.env([("--filter matmul", "hang_deaf")])
        words = [sys.executable, BENCHES / "first_run.py", *self.words(phases="selftest-matmul,kernels")]
        self.pids.unlink(missing_ok=True)
        child = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.addCleanup(child.kill)
        until = time.monotonic() + 120
        while not (self.pids.exists() and len(self.pids.read_text().split()) == 2):
            self.assertLess(time.monotonic(), until, "the second phase has not begun")
            time.sleep(0.02)
        return child


class Refusals(Case):
    def refused(self, *words):
        done = subprocess.run([sys.executable, BENCHES / "first_run.py", *words], env=self.env(), capture_output=True, text=True)
        self.assertEqual(done.returncode, 1)
        self.assertNotIn("Traceback", done.stderr)
        return done.stderr

    def test_a_program_that_is_not_there(self):
        self.assertIn("nowhere is not there", self.refused("--vitrum", str(self.scratch / "nowhere"), "--out", str(self.out)))
        self.assertFalse(self.out.exists())

    def test_a_program_that_cannot_be_executed(self):
        plain = self.scratch / "plain"
        plain.write_text("not a program")
        self.assertIn("cannot be executed", self.refused("--vitrum", str(plain), "--out", str(self.out)))

    def test_a_program_of_another_machine_fails_phase_by_phase(self):
        foreign = self.scratch / "foreign"
        foreign.write_bytes(b"\x7fELF of another processor")
        foreign.chmod(0o755)
        self.refused("--vitrum", str(foreign), "--out", str(self.out), "--phases", "steps")
        self.assertEqual([phase["state"] for phase in self.record()["phases"].values()], ["failed", "failed"])
        self.assertIn("cannot be started: Exec format error", self.record()["phases"]["doctor"]["why"])

    def test_a_folder_that_cannot_be_written(self):
        file = self.scratch / "file"
        file.touch()
        self.assertIn("Not a directory", self.refused(*self.words()[:2], "--out", str(file / "out")))

    def test_a_folder_with_earlier_results(self):
        self.out.mkdir()
        (self.out / "first-run.json").write_text("{}")
        self.assertIn("holds the results of an earlier run", self.refused(*self.words()))

    def test_a_phase_that_is_not_there_and_a_file_that_cannot_be_added(self):
        self.assertIn("no phase `step`: doctor, torch", self.refused(*self.words(phases="step")))
        self.assertIn("No such file", self.refused(*self.words("--add", str(self.scratch / "nowhere"))))
        for text in ("no JSON", "[]", "{}", '{"phases": {"steps": 3}}'):
            (self.scratch / "other").write_text(text)
            self.assertIn("is no first-run.json", self.refused(*self.words("--add", str(self.scratch / "other"))))
        self.assertFalse(self.out.exists())

    def test_a_folder_that_goes_away_on_the_way_costs_the_files_and_not_the_table(self):
        env = self.env([("--filter matmul", "remove_out")])
        done = subprocess.run([sys.executable, BENCHES / "first_run.py", *self.words()], env=env, capture_output=True, text=True)
        self.assertIn("cannot be written any more", done.stdout)
        self.assertIn("warning: no log of attention", done.stdout)
        self.assertIn("| attention of B/16, 512 images: forward ", done.stdout)

    def test_rows_that_no_table_can_be_made_of_are_kept(self):
        self.out.mkdir()
        record = first_run.Record(str(self.out), {"card": "a card"})
        record.phases["steps"] = {"rows": [{"mode": "odd"}]}
        self.assertIn("no table can be made of first-run.json: KeyError", record.write())
        self.assertEqual(self.record()["phases"]["steps"]["rows"], [{"mode": "odd"}])


class Tables(unittest.TestCase):
    def test_a_cards_predictions_are_those_with_the_most_words_of_its_name(self):
        cards = {"H100": {}, "H100 PCIe": {}, "H200": {}}
        for device, card in [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA GH200 480GB", None), (None, None)]:
            self.assertEqual(first_run_table.card_of(device, cards), card)

    def test_predictions_are_laid_beside_what_they_are_of_and_marked_where_they_miss(self):
        us = lambda likely: {"low": 0.9 * likely, "likely": likely, "high": 1.2 * likely}
        kernels = [
            {"name": "qkv", "us": us(500.0), "flops": 3.5e11},
            {"name": "attention_forward", "us": us(320.0), "flops": 6e10},
            {"name": "attention_backward_queries", "us": us(300.0), "flops": 6e10},
            {"name": "attention_backward_keys", "us": us(400.0), "flops": 6e10},
        ]
        rate = {"low": 4000.0, "likely": 4500.0, "high": 5200.0}
        model = {"batch": 512, "img_per_s": rate, "pruned": {"img_per_s": {"low": 5100.0, "likely": 5300.0, "high": 5500.0}}, "kernels": kernels}
        predictions = {"bf16": first_run_table.digest({"B/16": model})}
        bench = {"model": "B/16", "batch": 512, "ms": 100.0, "first_step_s": 2.0, "memory_bytes": 31 << 30, "planned_bytes": 30 << 30, "products": []}
        steps = [{**bench, "mode": mode, "img_per_s": 5000.0} for mode in ("bf16", "bf16, pruned", "bf16, pruned, stream f32")]
        peer = {**bench, "mode": "compile+cudnn", "img_per_s": 4000.0}
        times = [{"engine": "vitrum", "model": "B/16", "images": 256, "direction": way, "ms": ms} for way, ms in (("forward", 0.16), ("backward", 0.6))]
        theirs = [{"backend": b, "model": "B/16", "direction": "backward", "ms": ms} for b, ms in (("flash", 0.9), ("cudnn", 0.3))]
        kernels = [{"operation": "qkv, bias", "shape": "B/16 [100864, 768] → 2304", "ms": 0.5, "flops": 3.5e11}, {"copy_bytes_per_s": 3e12, "product_flops_per_s": 8e14}]
        found = {"steps": steps, "peers-eager": [{**peer, "img_per_s": 1000.0}], "peers-compiled": [peer], "attention": times, "peers-attention": theirs, "kernels": kernels}
        record = {"phases": {name: {"rows": rows} for name, rows in found.items()}, "predictions": predictions}
        table = {row["what"]: row for row in first_run_table.rows(record)}

        row = table["step of B/16, 512: bf16"]
        self.assertEqual((row["predicted"], row["outside"], row["ratio"]), (rate, None, 1.25))
        self.assertEqual(table["step of B/16, 512: bf16, pruned"]["outside"], "below")
        self.assertIsNone(table["step of B/16, 512: bf16, pruned, stream f32"]["predicted"])
        forward, backward = (table[f"attention of B/16, 256 images: {way}"] for way in ("forward", "backward"))
        # Half of the images of the prediction; both kernels of the backward.
        self.assertAlmostEqual(forward["predicted"]["likely"], 0.16)
        self.assertAlmostEqual(backward["predicted"]["likely"], 0.35)
        self.assertEqual((forward["outside"], backward["outside"]), (None, "above"))
        self.assertEqual((backward["peer"], backward["ratio"]), (("torch cudnn", 0.3), 0.5))
        products = table["products of a block of B/16"]
        self.assertAlmostEqual(products["measured"], 700.0)
        self.assertAlmostEqual(products["predicted"]["likely"], 700.0)
        self.assertAlmostEqual(products["ratio"], 0.875)
        self.assertIn("5,000 img/s, **below**", first_run_table.cells(table["step of B/16, 512: bf16, pruned"]))
        memory = table["memory of B/16, 512: bf16"]
        self.assertEqual((memory["predicted"]["low"], memory["outside"]), (30.0, None))

    def test_ways_of_products_are_listed_with_their_times(self):
        product = {"product": "qkv 100864x2304x768", "way": "fused", "microseconds": {"plain": 620.0, "fused": 540.0}}
        text = "\n".join(first_run_table.ways({"phases": {"choices": {"rows": [{"products": [product]}]}}}))
        self.assertIn("| qkv 100864x2304x768 | fused | fused 540, plain 620 |", text)

    def test_gradients_far_from_what_was_expected_fail(self):
        with tempfile.TemporaryDirectory() as scratch:
            run = SimpleNamespace(scratch=scratch, torch=None, torch_device=None, vitrum="vitrum", tiny=True)
            for found, fails in ((0.019, False), (0.021, True), (float("nan"), True)):
                rows = [{"case": "deep", "engine": "vitrum, stream bf16", "all": found, "expected": 0.01}]
                Path(scratch, "gradients.json").write_text(json.dumps({"rows": rows}))
                [command] = first_run.gradients(run)
                if fails:
                    self.assertRaisesRegex(Wrong, "deep, vitrum, stream bf16", command.read, "")
                else:
                    self.assertEqual(command.read("")[0]["apart"], found)


class Carry(Case):
    def setUp(self):
        super().setUp()
        tools = self.scratch / "tools"
        tools.mkdir()
        (tools / "strip").write_text('#!/bin/sh\ncp "$3" "$2"\n')
        (tools / "strip").chmod(0o755)
        self.path = f"{tools}:{os.environ['PATH']}"

    def carry(self, *more, program=HERE / "program.py", misbehave=()):
        words = [sys.executable, ROOT / "scripts" / "carry", self.scratch / "carried", "--vitrum", program, *more]
        return subprocess.run(words, env=self.env(misbehave, PATH=self.path), capture_output=True, text=True)

    def test_the_folder_runs_where_there_is_nothing_else(self):
        done = self.carry()
        self.assertEqual(done.returncode, 0, done.stderr)
        folder = self.scratch / "carried"
        (folder / "commit").write_text("abc1234\n")
        env = dict(self.env(), BENCHES=str(folder / "benches"))
        words = [sys.executable, "benches/first_run.py", "--out", self.out, "--phases", "selftest-matmul,curve"]
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual(self.record()["commit"], "abc1234")

    def test_a_folder_that_is_too_large_is_not_made_and_the_largest_files_are_named(self):
        large = self.scratch / "large"
        large.write_bytes((HERE / "program.py").read_bytes() + b"#" * (3 << 20))
        large.chmod(0o755)
        done = self.carry("--most", "2", program=large)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"would have 3\.\d MiB, more than 2: vitrum 3\.0 MiB, ")
        self.assertEqual([path.name for path in self.scratch.iterdir() if "carr" in path.name], [])

    def test_a_program_without_kernels_or_none_at_all_is_refused(self):
        done = self.carry(misbehave=[("doctor", "fail")])
        self.assertIn("does not run", done.stderr)
        without = self.scratch / "without"
        without.write_text('#!/bin/sh\necho \'{"kernels_reason": "no nvcc was found"}\'\n')
        without.chmod(0o755)
        done = self.carry(program=without)
        self.assertIn("has no CUDA kernels inside: no nvcc was found", done.stderr)
        self.assertEqual(self.carry("--without-kernels", program=without).returncode, 0)
        self.assertIn("is there already", self.carry("--without-kernels", program=without).stderr)


if __name__ == "__main__":
    unittest.main()
