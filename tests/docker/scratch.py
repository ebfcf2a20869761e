"""Runs a Dockerfile's steps one by one in scratch roots, where no docker daemon is at hand, and then the image's
command the way compose.yaml would have it run: as its user, as process 1, without capabilities, on a read-only root.

    why = scratch.unable("debootstrap")          # None, or why it can not be done here
    scratch.own_mounts()                         # from here on, mounts are this process's own and end with it
    image = scratch.build("docker/Dockerfile.cpu", folder, "debootstrap")
    scratch.own_network()                        # from here on, its ports too
    process = image.start(["graft", "serve"], env={...}, mounts={"/data": folder})

What a stage begins from is the packages of a bare Debian ("debootstrap"), or this machine's own root ("here"), where
apt-get is told that all is installed and the build stage's files are those of build/. Nothing is ever written to the
lower root: a stage is an overlay on it.
"""
import ctypes
import fcntl
import os
import pathlib
import platform
import shlex
import shutil
import socket
import struct
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import dockerfile  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SOURCES = """deb http://deb.debian.org/debian bookworm main
deb http://deb.debian.org/debian bookworm-updates main
deb http://deb.debian.org/debian-security bookworm-security main
"""


def unable(base):
    """Why steps can not be run here on that base; None where they can."""
    if platform.system() != "Linux" or os.geteuid() != 0:
        return "running the Dockerfile's steps takes root"
    if base == "debootstrap" and not shutil.which("debootstrap"):
        return "debootstrap is not installed (make deps)"
    if base == "here" and "bookworm" not in pathlib.Path("/etc/os-release").read_text():
        return "this machine is not Debian 12, which the image is"
    for tool in ("unshare", "setpriv", "chroot", "mount"):
        if not shutil.which(tool):
            return f"{tool} is not at hand"
    tried = subprocess.run(["unshare", "--mount", "--pid", "--fork", "sh", "-c", """
        d=$(mktemp -d) && mount -t tmpfs none "$d" && cd "$d" && mkdir l u w m && mount -t overlay overlay \
        -o lowerdir=l,upperdir=u,workdir=w m"""], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return None if tried.returncode == 0 else f"no overlay can be mounted here: {tried.stdout.strip()}"


def unshare(what):
    if ctypes.CDLL(None, use_errno=True).unshare(what) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def own_mounts():
    unshare(CLONE_NEWNS)
    mount("--make-rprivate", "/")


def own_network():
    """A network of this process's own, with a loopback and nothing else: every port is free, and nobody else's."""
    unshare(CLONE_NEWNET)
    with socket.socket() as any_socket:
        name = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, name))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def mount(*words):
    subprocess.run(["mount", *map(str, words)], check=True)


class Stage:
    """A root, and what its instructions have said so far."""

    def __init__(self, folder, lower, in_memory):
        self.root, self.env, self.user, self.workdir = folder / "root", {"PATH": PATH}, "0:0", "/"
        self.entrypoint, self.cmd, self.health, self.volume = [], [], [], None
        folder.mkdir()
        if in_memory:  # an upper folder may not lie within the lower one
            mount("-t", "tmpfs", "none", folder)
        for name in ("root", "upper", "work"):
            (folder / name).mkdir()
        mount("-t", "overlay", "overlay", "-o", f"lowerdir={lower},upperdir={folder}/upper,workdir={folder}/work",
              self.root)

    def argv(self, words, env=None, mounts=None, contained=False):
        """The command line that runs `words` in this root. mounts: {path in the root: folder or file of ours}."""
        root = shlex.quote(str(self.root))
        user, group = self.user.split(":")
        steps = [f"mount --bind {root} {root}"]
        for where, what in (mounts or {}).items():
            at = self.root / where.lstrip("/")
            if pathlib.Path(what).is_dir():
                at.mkdir(parents=True, exist_ok=True)
            else:
                at.parent.mkdir(parents=True, exist_ok=True)
                at.touch()
        if contained:
            steps.append(f"mount -o remount,bind,ro {root}")
        steps += [f"mount -t proc proc {root}/proc", f"mount -t tmpfs none {root}/dev", f"mount -t tmpfs none {root}/tmp",
                  f"chmod 1777 {root}/tmp"]
        for device in ("null", "zero", "full", "random", "urandom"):
            steps += [f": >{root}/dev/{device}", f"mount --bind /dev/{device} {root}/dev/{device}"]
        steps += [f"ln -s /proc/self/fd {root}/dev/fd"]
        steps += [f"mount --bind {shlex.quote(str(what))} {root}{where}" for where, what in (mounts or {}).items()]
        less = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"] if contained else []
        values = {**self.env, **(env or {})}
        run = ["chroot", str(self.root), "/usr/bin/setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *less,
               "/usr/bin/env", "-i", *(f"{k}={v}" for k, v in values.items()),
               "/bin/sh", "-c", 'cd "$0" && exec "$@"', self.workdir, *words]
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-e", "-c",
                "\n".join([*steps, "exec " + shlex.join(run)])]

    def run(self, words, limit=600, **options):
        """Status and output."""
        done = subprocess.run(self.argv(words, **options), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=limit)
        return done.returncode, done.stdout

    def start(self, words, log, **options):
        return subprocess.Popen(self.argv(words, **options), stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    # ------------------------------------------------------------ instructions

    def step(self, instruction, built, context):
        do = getattr(self, "do_" + instruction.name.lower(), None)
        if do is None:
            raise dockerfile.Problem(f"{instruction}: no step for it")
        do(instruction, built, context)

    def do_run(self, instruction, built, context):
        status, out = self.run(["/bin/sh", "-c", instruction.text])
        if status != 0:
            raise dockerfile.Problem(f"{instruction}: ended with {status}\n{out[-4000:]}")

    def do_copy(self, instruction, built, context):
        *sources, target = [w for w in instruction.words if not w.startswith("--")]
        at = self.root / target.lstrip("/") if target.startswith("/") else self.root / self.workdir.lstrip("/") / target
        origin = instruction.flag("from")
        for source in sources:
            if origin:
                files = [(built[origin].root / source.lstrip("/"), at)]
            elif source == ".":
                files = [(context.root / p, at / p) for p in context.files()]
            else:
                files = [(context.root / source, at)]
            for file, to in files:
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, to)

    def do_user(self, instruction, built, context):
        self.user = instruction.text

    def do_env(self, instruction, built, context):
        self.env.update(w.split("=", 1) for w in instruction.words)

    def do_workdir(self, instruction, built, context):
        self.workdir = instruction.text
        (self.root / self.workdir.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def do_volume(self, instruction, built, context):
        self.volume = instruction.text

    def do_expose(self, instruction, built, context):
        pass  # says which port, opens none

    def do_healthcheck(self, instruction, built, context):
        self.health = dockerfile.Instruction("CMD", instruction.text.split("CMD ", 1)[1], instruction.line).words

    def do_entrypoint(self, instruction, built, context):
        self.entrypoint = instruction.words

    def do_cmd(self, instruction, built, context):
        self.cmd = instruction.words


def bare_debian(folder):
    """What debian:bookworm-slim has, near enough: the base system and the three archives."""
    done = subprocess.run(["debootstrap", "--variant=minbase", "bookworm", folder], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=900)
    if done.returncode != 0:
        raise dockerfile.Problem(f"debootstrap ended with {done.returncode}\n{done.stdout[-2000:]}")
    (folder / "etc/apt/sources.list").write_text(SOURCES)
    shutil.copy("/etc/resolv.conf", folder / "etc/resolv.conf")
    (folder / "etc/apt/apt.conf.d/90scratch").write_text('Dpkg::Options {"--force-unsafe-io";};\n')
    for file in pathlib.Path("/etc/apt/apt.conf.d").glob("*proxy*"):
        shutil.copy(file, folder / "etc/apt/apt.conf.d")


def build(path, folder, base, say=lambda text: None):
    """The last stage of the Dockerfile, after all steps. own_mounts() first."""
    folder = pathlib.Path(folder)
    lower = pathlib.Path("/")
    if base == "debootstrap":
        say("debootstrap")
        lower = folder / "debian"
        bare_debian(lower)
    context, built = dockerfile.Context(ROOT), {}
    stages = dockerfile.stages(dockerfile.read(ROOT / path))
    for number, stage in enumerate(stages):
        if base == "here" and stage is not stages[-1]:
            built[stage.name] = Present()
            continue
        made = Stage(folder / f"stage{number}", lower, base == "here")
        if base == "here":
            stub = made.root / "usr/local/sbin/apt-get"
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.write_text("#!/bin/sh\n# this root has the packages already\nexit 0\n")
            stub.chmod(0o755)
        for instruction in stage.instructions:
            say(str(instruction)[:100])
            made.step(instruction, built, context)
        built[stage.name] = made
    return made


class Present:
    """Stands for the build stage: what `make` has built here, under the name that the Dockerfile has for it."""

    class Root:
        def __truediv__(self, path):
            return ROOT / path.removeprefix("src/")

    root = Root()
