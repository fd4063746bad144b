"""The kernels that a build embeds, and NVIDIA's tools that read them: for kernel-table, ptxas-versions and sass-lint."""
import collections
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOOLS = "13.2.86"  # of cuobjdump and nvdisasm; both read what older compilers wrote

# One instruction: the labels in front of it, the predicate, opcode and operands.
Instruction = collections.namedtuple("Instruction", "address labels predicate opcode operands")


def build():
    """The program, the folder of the stand-in GPU, and the `images.rs` with the kernels that build.rs embedded."""
    command = ["cargo", "build", "--locked", "--message-format=json", "-p", "vitrum", "-p", "vitrum-standin"]
    out = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
    program = images = None
    for line in out.splitlines():
        message = json.loads(line)
        of_vitrum = "vitrum@" in message.get("package_id", "") or "#vitrum" in message.get("package_id", "")
        if message["reason"] == "compiler-artifact" and message["target"]["name"] == "vitrum" and message.get("executable"):
            program = message["executable"]
        path = os.path.join(message.get("out_dir", ""), "images.rs")
        if message["reason"] == "build-script-executed" and os.path.isfile(path):
            images = path
    return program, os.path.join(os.path.dirname(program), "standin"), images


def images_of(arguments):
    """What a script for kernels reads: those of `--images`, or of a build."""
    with open(arguments.images or build()[2]) as file:
        return file.read()


def embedded(images):
    """The fat binaries that `images` embeds, and the names of the hot kernels."""
    return re.findall(r'image!\("([^"]+)"\)', images), set(re.findall(r'name: "(\w+)", target: "\w+", hot: true', images))


def cache():
    return os.environ.get("VITRUM_CACHE") or os.path.expanduser("~/.cache/vitrum")


def fetch(folder, packages, wanted):
    """Installs packages of PyPI without their dependencies into a folder of the cache, once; the files, or None."""
    folder = os.path.join(cache(), folder)
    paths = [os.path.join(folder, path) for path in wanted]
    if not all(map(os.path.isfile, paths)):
        # Into another folder first: an interrupted download leaves no half of a tool.
        part = f"{folder}.{os.getpid()}.part"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", part]
        try:
            if subprocess.run(command + packages).returncode:
                return None
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    for path in paths:
        os.chmod(path, 0o755)
    return paths


def tools():
    """A folder with cuobjdump and nvdisasm."""
    found = shutil.which("cuobjdump"), shutil.which("nvdisasm")
    if all(found):
        return os.path.dirname(found[0])
    names = ("cuobjdump", "nvdisasm")
    packages = [f"nvidia-cuda-{name}=={TOOLS}" for name in names]
    found = fetch(os.path.join("cuda-tools", TOOLS), packages, [os.path.join("nvidia", "cu13", "bin", name) for name in names])
    return found and os.path.dirname(found[0])


def extract(folder, what, fatbin, into):
    """Writes the parts of a fat binary, `elf` or `ptx`, into a folder."""
    subprocess.run([os.path.join(folder, "cuobjdump"), f"-x{what}", "all", fatbin], cwd=into, stdout=subprocess.DEVNULL, check=True)


def disassemble(folder, cubins):
    """The functions of each file of machine code."""

    def one(cubin):
        return functions(subprocess.run([os.path.join(folder, "nvdisasm"), "-c", cubin], stdout=subprocess.PIPE, check=True, text=True).stdout)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, cubins))


def embedded_code(folder, fatbins):
    """(target, kernel) → its instructions, from the machine code of fat binaries."""
    with tempfile.TemporaryDirectory() as scratch:
        for fatbin in fatbins:
            extract(folder, "elf", fatbin, scratch)
        cubins = sorted(os.listdir(scratch))
        code = disassemble(folder, [os.path.join(scratch, name) for name in cubins])
    # NAME.sm_80.cubin
    return {(name.split(".")[-2], kernel): body for name, found in zip(cubins, code) for kernel, body in found.items()}


INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"(\.L_x_\d+|\$[^\s:]+):\s*$")


def functions(text):
    """Kernel → its instructions and those of the routines that ptxas put behind it, from the text of `nvdisasm -c`."""
    found, code, labels = {}, None, []
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+(\S+?),", line):
            name = match[1]
            code, labels = (found.setdefault(name[len(".text.") :], []), []) if name.startswith(".text.") else (None, [])
        elif code is None:
            continue
        elif match := INSTRUCTION.match(line):
            code.append(Instruction(int(match[1], 16), tuple(labels), match[2], match[3], match[4]))
            labels = []
        elif match := LABEL.match(line):
            labels.append(match[1])
    return found
