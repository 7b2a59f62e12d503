"""Compiles, times or checks lowered modules; a subprocess of `gpu_step`.

    python gpu_step_worker.py FOLDER [NAME...]

It runs in its own environment, because XLA's compiler for GPUs comes with JAX,
which is not a dependency of this project. FOLDER holds, for each NAME, a module
and its metadata, and in plan.json what to do with them:

- "compile": compiles them for the GPU of a description, without one;
- "run": compiles them for the GPU at hand and times them in turns;
- "check": runs them on the CPU, and compares the results with TensorFlow's.

Results are in results.json after each module and each round, so that nothing is
lost if the program is cut off. The last line of the output is a JSON object,
empty or an "error" of all modules, with which the exit code is 1.
"""

import hashlib
import importlib
import json
import os
import pathlib
import re
import statistics
import sys
import time

import numpy as np

if len(sys.argv) < 2:
    sys.exit("Usage: python gpu_step_worker.py FOLDER [NAME...]")
FOLDER = pathlib.Path(sys.argv[1])
PLAN = json.loads((FOLDER / "plan.json").read_text("utf-8"))

# Before JAX is imported. To try "run" without a GPU, set it to cpu.
if PLAN["action"] == "run":
    os.environ.setdefault("JAX_PLATFORMS", "cuda")
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Nothing else runs on the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

# Imported by name, because the project's environment lacks them, and from this
# folder, because this environment lacks the project.
jax = importlib.import_module("jax")
topologies = importlib.import_module("jax.experimental.topologies")
xla_module = importlib.import_module("xla_module")
recipes = importlib.import_module("recipes")

# Keras counts steps in int64.
jax.config.update("jax_enable_x64", True)

# Without a GPU kernels cannot be timed to choose among them. With one, level 2
# is XLA's default without its checks of the results.
NO_TUNING = {"xla_gpu_autotune_level": 0}
TUNING = {"xla_gpu_autotune_level": 2}

# Operations of an optimized module that run as a kernel or call a library.
KERNEL = re.compile(r" (?:fusion|custom-call|sort|copy|convolution|dot)\(")


class Results:
    """Figures by module, in a file that is written after each change."""

    def __init__(self, path):
        self._path = path
        self.figures = {}
        if path.is_file():
            self.figures = json.loads(path.read_text("utf-8"))

    def add(self, name, figures):
        """Adds figures of a module, and writes all."""
        self.figures.setdefault(name, {}).update(figures)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.figures), "utf-8")
        # As a whole, so that the file is never cut off.
        temporary.replace(self._path)

    def attempt(self, name, function, *arguments):
        """Adds the figures that a function returns, or its error."""
        begin = time.perf_counter()
        try:
            figures = function(*arguments)
        except Exception as error:
            text = " ".join(str(error).split())
            figures = {"error": text or type(error).__name__}
        self.add(name, figures)
        seconds = time.perf_counter() - begin
        text = figures.get("error", "done")
        print(f"{name}: {text} ({seconds:.0f} s)", flush=True)
        return "error" not in figures


class Program:
    """A compiled module and the values of its arguments.

    Attributes:
        metadata: What the project stored with the module.
        arguments: Arrays on the device. Those that the module updates in place
            are replaced by each call.
        aliases: By result, the argument that it replaces.
        results: Arrays of the last call.
    """

    def __init__(self, name, device, options):
        path = FOLDER / f"{name}.json"
        self.metadata = json.loads(path.read_text("utf-8"))
        begin = time.perf_counter()
        with xla_module.context():
            module, self.aliases = xla_module.read(FOLDER / f"{name}.mlirbc")
            self.executable = xla_module.compile_module(
                module, [device], options, load=PLAN["action"] != "compile"
            )
        self.compile_s = time.perf_counter() - begin
        self.arguments = []
        self.results = []

    def figures(self):
        """Returns memory and operations, and the seconds of compilation."""
        text = xla_module.text(self.executable)
        return {
            **xla_module.figures(self.executable),
            "kernels": count_kernels(text),
            "compile_s": self.compile_s,
        }

    def make_arguments(self, device):
        """Makes the arguments that the metadata describe."""
        self.arguments = [
            jax.device_put(recipes.Recipe(**recipe).make(seed), device)
            for seed, recipe in enumerate(self.metadata["arguments"])
        ]

    def run(self, steps):
        """Calls the program some times; returns seconds for each call."""
        begin = time.perf_counter()
        for _ in range(steps):
            outputs = self.executable.execute_sharded(self.arguments)
            self.results = [
                arrays[0]
                for arrays in outputs.disassemble_into_single_device_arrays()
            ]
            for result, argument in self.aliases.items():
                self.arguments[argument] = self.results[result]
        jax.block_until_ready(self.results)
        return (time.perf_counter() - begin) / steps

    def digest(self, count):
        """Returns a hash of the first results."""
        digest = hashlib.sha256()
        for array in self.results[:count]:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def count_kernels(text):
    """Counts the kernels of an optimized module; those in a loop count once."""
    # What is inside of a fusion is one kernel.
    fused = set(re.findall(r" fusion\(.* calls=%?([\w.-]+)", text))
    count = 0
    computation = ""
    for line in text.splitlines():
        begin = re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line)
        if begin:
            computation = begin.group(1)
        elif computation not in fused:
            count += bool(KERNEL.search(line))
    return count


def compile_modules(names, results):
    """Compiles modules for a described GPU."""
    (device,) = topologies.get_topology_desc(
        platform="cuda",
        topology_name=PLAN["gpu"],
        topology="1x1x1",
        target_config=PLAN["description"],
    ).devices
    for name in names:
        results.attempt(
            name,
            lambda name=name: Program(name, device, NO_TUNING).figures(),
        )


def time_modules(names, results):
    """Times modules on the GPU, in rounds in which they take turns."""
    device = jax.devices()[0]
    programs = {}

    def prepare(name):
        program = Program(name, device, TUNING)
        results.add(name, {**program.figures(), "device": device.device_kind})
        program.make_arguments(device)
        # Also finds out whether it fits the memory.
        program.run(PLAN["warm_up"])
        programs[name] = program
        if "digest" not in program.metadata:
            return {}
        expected = program.metadata["digest"]
        actual = program.digest(program.metadata["digest_results"])
        return {"equal": actual == expected}

    for name in names:
        results.attempt(name, prepare, name)
    rounds = {name: [] for name in programs}
    for number in range(PLAN["rounds"]):
        for name, program in programs.items():
            program.run(2)
            # Three groups, whose median ignores a disturbance.
            groups = [program.run(PLAN["steps"]) for _ in range(3)]
            rounds[name].append(1e3 * statistics.median(groups))
            results.add(name, {"rounds_ms": rounds[name]})
        print(f"round {number + 1} of {PLAN['rounds']}: done", flush=True)


def check_modules(names, results):
    """Compares steps on the CPU with those of TensorFlow."""
    device = jax.devices()[0]

    def check(name):
        program = Program(name, device, None)
        program.make_arguments(device)
        found = []
        for step in range(program.metadata["steps"]):
            before = [np.asarray(array) for array in program.arguments]
            program.run(1)
            expected = np.load(FOLDER / f"{name}_{step}.npz")
            found += differences(program, before, expected)
        # Unlike `max`, these are NaN if any difference is.
        return {
            "largest": round_off(np.max(found)),
            "median": round_off(np.median(found)),
        }

    for name in names:
        results.attempt(name, check, name)


def differences(program, before, expected):
    """Compares the variables that a step changes with those of TensorFlow.

    Args:
        program: The program after a step.
        before: Its arguments before the step.
        expected: TensorFlow's variables after the step, by argument.

    Returns:
        The norm of each variable's difference, relative to the norm of the
        step's change of that variable. Changes below a millionth of the largest
        count as a millionth: those of biases before batch normalization are
        only rounding.
    """
    errors, changes = [], []
    # All variables, also those that the module should assign but does not.
    for name in expected.files:
        old, new, wanted = (
            np.asarray(array).astype(np.float64)
            for array in (
                before[int(name)],
                program.arguments[int(name)],
                expected[name],
            )
        )
        if np.array_equal(old, new) and np.array_equal(old, wanted):
            continue
        errors.append(np.linalg.norm((new - wanted).ravel()))
        changes.append(np.linalg.norm((wanted - old).ravel()))
    floor = 1e-6 * np.max(changes)
    return [e / max(c, floor) for e, c in zip(errors, changes, strict=True)]


def round_off(number):
    """Rounds to two digits."""
    return float(f"{number:.1e}")


def main():
    """Does what the plan says, and prints one line of JSON."""
    results = Results(FOLDER / "results.json")
    names = sys.argv[2:] or PLAN["names"]
    actions = {
        "compile": compile_modules,
        "run": time_modules,
        "check": check_modules,
    }
    try:
        actions[PLAN["action"]](names, results)
    except Exception as error:
        print(json.dumps({"error": " ".join(str(error).split())}))
        sys.exit(1)
    else:
        print("{}")


if __name__ == "__main__":
    main()
