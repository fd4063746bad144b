"""The table at the end of `first_run.py`: turns the rows of its phases into lines of what, predicted, measured, peer and ratio.

A ratio is against the peer, and above 1 if Vitrum is better. A figure outside its predicted interval is marked as `below` or `above`
it.
"""
import re
import statistics

GIB = 2**30
# GPU memory of a program besides what it plans: a context, kernels, a recorded step.
BESIDE_PLAN = 2 * GIB
PRODUCTS = ("qkv", "proj", "fc1", "fc2")


def rows(record):
    """Every line of the table for which the phases have results."""
    found = {name: phase["rows"] for name, phase in record["phases"].items()}
    makers = (selftests, steps, starts, memory, curve, gradients, ceilings, products, attention)
    return [row for maker in makers for row in maker(found, record.get("predictions") or {})]


def line(what, unit, measured, predicted=None, peer=None, less_is_better=False):
    """`predicted`: {low, likely, high}; `peer`: (name, value)."""
    if measured is None:
        outside, ratio = "not finite", None
    else:
        outside = predicted and ("below" if measured < predicted["low"] else "above" if measured > predicted["high"] else None)
        ratio = peer and (peer[1] / measured if less_is_better else measured / peer[1])
    return {"what": what, "unit": unit, "predicted": predicted, "measured": measured, "outside": outside, "peer": peer, "ratio": ratio}


def times(interval, factor):
    return {key: factor * value for key, value in interval.items()}


# ---- What is predicted ----


def card_of(device, cards):
    """The GPU of a device's name: the one with the most words that all occur in the name."""
    words = set(re.findall(r"\w+", device or ""))
    fitting = [card for card in cards if set(re.findall(r"\w+", card)) <= words]
    return max(fitting, key=lambda card: len(card.split()), default=None)


def digest(models):
    """The predictions for a GPU's models that are compared with measurements; missing ones stay missing."""
    return {model: predicted_of(step) for model, step in models.items()}


def predicted_of(step):
    kernels = {kernel["name"]: kernel for kernel in step.get("kernels", [])}
    digest = {"whole": step.get("img_per_s"), "pruned": step.get("pruned", {}).get("img_per_s")}
    for direction in ("forward", "backward"):
        parts = [k["us"] for name, k in kernels.items() if name.startswith(f"attention_{direction}")]
        if parts:
            one_image = 1e-3 / step["batch"]
            digest[direction] = {case: one_image * sum(us[case] for us in parts) for case in ("low", "likely", "high")}
    parts = [k for name, k in kernels.items() if name.startswith(PRODUCTS)]
    if parts:
        flops = sum(k["flops"] for k in parts)
        slow_first = (("low", "high"), ("likely", "likely"), ("high", "low"))
        digest["products"] = {rate: flops / sum(k["us"][time] for k in parts) / 1e6 for rate, time in slow_first}
    return digest


# ---- Lines, by subject ----


def selftests(found, _):
    for phase in ("selftest-matmul", "selftest-attention", "selftest-training", "selftest-rest"):
        for row in found.get(phase, []):
            if row["cases"]:
                yield line(f"{phase}, passed of {row['cases']}", "cases", row["cases"] - row["failed"])
            for proof in row["training"]:
                allowed = {"low": 0.0, "likely": 0.0, "high": proof["tolerance"]}
                again = "" if proof["repeats"] else ", OTHER BITS the second time"
                yield line(f"{phase}, {proof['device']}: from the CPU's{again}", "relative", proof["distance"], allowed)


def best_peer(found, model):
    rows = [row for name in found if name.startswith("peers-") for row in found[name] if row.get("model") == model and "img_per_s" in row]
    return max(rows, key=lambda row: row["img_per_s"], default=None)


def steps(found, predictions):
    for row in found.get("steps", []):
        predicted = predictions.get("f32" if "f32" in row["mode"] else "bf16", {}).get(row["model"], {})
        predicted = predicted.get("pruned" if "pruned" in row["mode"] else "whole")
        peer = best_peer(found, row["model"])
        peer = peer and (f"torch {peer['mode']}", peer["img_per_s"])
        yield line(f"step of {row['model']}, {row['batch']}: {row['mode']}", "img/s", row["img_per_s"], predicted, peer)


def starts(found, _):
    for phase, which in (("choices", "first"), ("steps", "later")):
        for row in found.get(phase, []):
            if row["mode"] == "bf16":
                peer = best_peer(found, row["model"])
                peer = peer and (f"torch {peer['mode']}", peer["first_step_s"])
                yield line(f"{which} start of {row['model']}, to its first step", "s", row["first_step_s"], None, peer, True)


def memory(found, _):
    for row in found.get("steps", []):
        if row["mode"] in ("bf16", "bf16, pruned, stream f32"):
            plan = row["planned_bytes"] / GIB
            planned = {"low": plan, "likely": plan, "high": plan + BESIDE_PLAN / GIB}
            peer = best_peer(found, row["model"])
            peer = (f"torch {peer['mode']}", peer["memory_bytes"] / GIB) if peer and peer["memory_bytes"] else None
            yield line(f"memory of {row['model']}, {row['batch']}: {row['mode']}", "GiB", row["memory_bytes"] / GIB, planned, peer, True)


def curve(found, _):
    for row in found.get("curve", []):
        near = {"low": 0.0, "likely": row["rounding"], "high": row["allowed"]}
        yield line("loss curve, farthest from the CPU's", "loss", row["apart"], near)
        loss, cpu = row["val"]["loss"], row["cpu"]["val"]["loss"]
        around = {"low": cpu - row["allowed"], "likely": cpu, "high": cpu + row["allowed"]}
        yield line("loss curve, validation at the end", "loss", loss, around)


def gradients(found, _):
    rows = found.get("gradients", [])
    for row in rows:
        if not row["engine"].startswith("vitrum") or row["engine"].endswith("cpu"):
            continue
        peer = next((("torch autocast", r["apart"]) for r in rows if r["case"] == row["case"] and r["engine"].startswith("torch")), None)
        likely = row["expected"]
        near = likely and {"low": 0.5 * likely, "likely": likely, "high": 2 * likely}
        yield line(f"gradients of `{row['case']}`, {row['engine']}: from exact ones", "relative", row["apart"], near, peer, True)


def ceilings(found, _):
    rows = [row for row in found.get("kernels", []) if "copy_bytes_per_s" in row]
    if rows:
        yield line("large copy", "GB/s", statistics.median(row["copy_bytes_per_s"] for row in rows) / 1e9)
        yield line("large product of bf16", "TFLOP/s", statistics.median(row["product_flops_per_s"] for row in rows) / 1e12)


def products(found, predictions):
    """All products of a block as one rate, compared with the rate of a large product on the same GPU."""
    rows = [row for row in found.get("kernels", []) if row.get("flops") and row["operation"].startswith(PRODUCTS)]
    rows = [row for row in rows if "stream f32" not in row["shape"]]
    large = [row["product_flops_per_s"] for row in found.get("kernels", []) if "product_flops_per_s" in row]
    for model in dict.fromkeys(row["shape"].split(" [")[0] for row in rows):
        its = [row for row in rows if row["shape"].startswith(f"{model} [")]
        rate = sum(row["flops"] for row in its) / sum(row["ms"] for row in its) / 1e9
        predicted = predictions.get("bf16", {}).get(model, {}).get("products")
        yield line(f"products of a block of {model}", "TFLOP/s", rate, predicted, ("large product", statistics.median(large) / 1e12))


def attention(found, predictions):
    theirs = [row for row in found.get("peers-attention", []) if "ms" in row]
    for row in found.get("attention", []):
        same = [t for t in theirs if (t["model"], t["direction"]) == (row["model"], row["direction"])]
        best = min(same, key=lambda t: t["ms"], default=None)
        peer = best and (f"torch {best['backend']}", best["ms"])
        predicted = predictions.get("bf16", {}).get(row["model"], {}).get(row["direction"])
        predicted = predicted and times(predicted, row["images"])
        yield line(f"attention of {row['model']}, {row['images']} images: {row['direction']}", "ms", row["ms"], predicted, peer, True)


# ---- Text ----


def number(value):
    """Three significant digits."""
    if value is None:
        return ""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def cells(row):
    predicted = row["predicted"]
    if predicted:
        predicted = f"{number(predicted['likely'])} ({number(predicted['low'])} to {number(predicted['high'])})"
    measured = f"{number(row['measured'])} {row['unit']}"
    if row["outside"]:
        measured += f", **{row['outside']}**"
    peer = f"{number(row['peer'][1])}, {row['peer'][0]}" if row["peer"] else ""
    return [row["what"], predicted or "", measured, peer, f"{row['ratio']:.2f}" if row["ratio"] else ""]


def table(head, lines):
    """Markdown that also reads as a table in plain text."""
    lines = [head, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    text.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(line)} |" for line in text]


def markdown(record):
    rows_ = record["table"]
    lines = [f"# First run: {record['card'] or 'no card'}", ""]
    torch = f"torch {record['torch']}" if record["torch"] else "no PyTorch"
    lines += [f"`benches/first_run.py` on {record['date']}, commit {record['commit'] or 'not said'}, {torch}.", ""]
    if record["stand_in"]:
        lines += ["**The stand-in GPU computes on the host: no time below says anything about a card.**", ""]
    elif record["tiny"]:
        lines += ["**Tiny sizes: no time below says anything about a model.**", ""]
    if rows_:
        lines += table(["what", "predicted", "measured", "peer", "ratio"], [cells(row) for row in rows_])
        why = record["predictions"].get("why")
        predicted = f"not there ({why})" if why else f"those of `scripts/predict-gpu` for {record['predictions'].get('card', 'no card')}"
        outside = sum(1 for row in rows_ if row["outside"])
        lines += ["", f"{outside} figures lie outside of what was expected. Predicted rates are {predicted}. A ratio above 1 is in favour of Vitrum.", ""]
    lines += ["## Phases", ""]
    phases = [[name, p["state"], f"{p['seconds']:.0f} s", (p["why"] or "").replace("|", "/")] for name, p in record["phases"].items()]
    lines += table(["phase", "state", "took", "why"], phases) + [""]
    return "\n".join(lines + ways(record) + backends(record) + operations(record))


def ways(record):
    """How each matrix product is computed, and the time of the other ways."""
    benches = [row for name in ("choices", "steps") for row in record["phases"].get(name, {"rows": []})["rows"]]
    if not benches:
        return []
    lines, chosen = ["## Ways of matrix products", ""], {}
    for row in benches:
        chosen |= {product["product"]: product for product in row["products"] or []}
    if not chosen:
        return [*lines, "This build prints no choices.", ""]
    cells_ = []
    for product in chosen.values():
        took = sorted(product["microseconds"].items(), key=lambda way: way[1])
        cells_.append([product["product"], product["way"], ", ".join(f"{way} {number(us)}" for way, us in took)])
    return [*lines, *table(["product", "way", "µs of each"], cells_), ""]


def backends(record):
    rows_ = record["phases"].get("peers-attention", {"rows": []})["rows"]
    if not rows_:
        return []
    of = {(row["model"], row["backend"], row.get("direction")): row for row in rows_}
    lines = [
        [model, backend, *(number(of.get((model, backend, way), {}).get("ms")) for way in ("forward", "backward")), of.get((model, backend, None), {}).get("refused", "")]
        for model, backend in dict.fromkeys((row["model"], row["backend"]) for row in rows_)
    ]
    return ["## Attention of PyTorch", "", *table(["model", "backend", "forward, ms", "backward, ms", "refused"], lines), ""]


def operations(record):
    rows_ = [row for row in record["phases"].get("kernels", {"rows": []})["rows"] if "operation" in row]
    if not rows_:
        return []
    lines = []
    for row in rows_:
        flops = f"{row['flops'] / row['ms'] / 1e9:,.0f}" if row["flops"] else ""
        of_product = f"{100 * row['of_product']:.1f} %" if row["of_product"] else ""
        rate = f"{row['bytes'] / row['ms'] / 1e6:,.0f}"
        lines.append([row["operation"], row["shape"], f"{row['ms']:.4f}", rate, f"{100 * row['of_copy']:.1f} %", flops, of_product])
    head = ["operation", "shape", "ms", "GB/s", "of copy", "TFLOP/s", "of product"]
    return ["## Operations", "", *table(head, lines), ""]
