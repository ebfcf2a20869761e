"""The files of docker/ hold together, as far as can be seen without building them: instructions, sources, packages,
pins; and compose.yaml says nothing that `graft` does not accept."""
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
import dockerfile  # noqa: E402

DOCKER = ROOT / "docker"
GRAFT = os.environ.get("GRAFT_BIN") or str(ROOT / "build" / "graft")
MAKEFILE = (ROOT / "Makefile").read_text() + (ROOT / "engine/cuda/cuda.mk").read_text()
FILES = ("Dockerfile.cpu", "Dockerfile.cuda")
PINNED = re.compile(r"[\w./-]+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}$")
# Debian 12's names that Ubuntu 24.04 spells otherwise.
UBUNTU_NAMES = {"libmicrohttpd12": "libmicrohttpd12t64", "libssl3": "libssl3t64"}


def stages(name):
    return dockerfile.stages(dockerfile.read(DOCKER / name))


def known_settings(command):
    """(flags, variables) of `graft help COMMAND`."""
    text = subprocess.run([GRAFT, "help", command], check=True, stdout=subprocess.PIPE, text=True).stdout
    return set(re.findall(r"^  (--[a-z-]+)", text, re.M)), set(re.findall(r"\[(GRAFT_[A-Z_]+)\]$", text, re.M))


def commands():
    text = subprocess.run([GRAFT, "help"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return set(re.findall(r"^  ([a-z]+(?: [a-z]+)?)  ", text, re.M))


class Reader(unittest.TestCase):
    """The reader must refuse what it does not know, or a lint with it proves nothing."""

    def read(self, text):
        with tempfile.NamedTemporaryFile("w", suffix=".df") as file:
            file.write(text)
            file.flush()
            return dockerfile.stages(dockerfile.read(file.name))

    def test_lines_that_go_on_and_comments(self):
        (stage,) = self.read("# a\nFROM a:1\nRUN b \\\n    # c\n    d \\\n    && e\n")
        self.assertEqual((stage.base, stage.all("RUN")[0].text, stage.all("RUN")[0].line), ("a:1", "b d && e", 3))

    def test_both_forms(self):
        (stage,) = self.read('FROM a:1\nCMD ["b", "c d"]\nCOPY --from=x --chmod=755 e f\n')
        self.assertEqual(stage.last("CMD").words, ["b", "c d"])
        self.assertEqual((stage.last("COPY").flag("from"), stage.last("COPY").flag("chmod"),
                          stage.last("COPY").flag("chown")), ("x", "755", None))

    def test_what_it_does_not_know_is_an_error(self):
        for text in ("FROM a:1\nRUNS b\n", "RUN a\n", "FROM a:1 AS\n", "FROM a:1\nRUN b \\\n", "FROM a:1\nUSER\n"):
            with self.subTest(text), self.assertRaises(dockerfile.Problem):
                self.read(text)

    def test_packages(self):
        (stage,) = self.read("FROM a:1\nRUN apt-get update && X=1 apt-get install -y a b-1 && rm -rf c\n")
        self.assertEqual(dockerfile.packages(stage), ["a", "b-1"])

    def test_ignored_paths(self):
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / ".dockerignore").write_text("# a\n*\n!a\n!b/c\na/d\n")
            context = dockerfile.Context(folder)
            sent = [p for p in ("a", "a/x/y", "a/d", "a/d/e", "b", "b/c", "b/x", "c", "x/a") if context.sends(p)]
        self.assertEqual(sent, ["a", "a/x/y", "b/c"])


class Dockerfiles(unittest.TestCase):
    def test_two_stages_from_pinned_bases(self):
        for name in FILES:
            build, run = stages(name)
            self.assertEqual((build.name, run.name), ("build", None), name)
            for stage in (build, run):
                self.assertRegex(stage.base, PINNED)

    def test_what_is_copied_is_there(self):
        sent = dockerfile.Context(ROOT).files()
        for name in FILES:
            done = {}
            for stage in stages(name):
                for copy in stage.all("COPY"):
                    *sources, _ = [w for w in copy.words if not w.startswith("--")]
                    origin = copy.flag("from")
                    if origin:
                        self.assertIn(origin, done, f"{name}: {copy}: no stage before it has that name")
                        continue
                    for source in sources:
                        self.assertTrue(source == "." or source in sent or
                                        any(p.startswith(source.rstrip("/") + "/") for p in sent),
                                        f"{name}: {copy}: {source} is not sent to the build")
                done[stage.name] = stage

    def test_what_a_build_makes_is_what_is_copied_out_of_it(self):
        for name in FILES:
            for copy in stages(name)[1].all("COPY"):
                if copy.flag("from"):
                    made = re.match(r"/src/build/(\S+)$", copy.words[-2])
                    self.assertTrue(made, f"{name}: {copy}")
                    self.assertTrue(f"$(BUILD)/{made.group(1)}" in MAKEFILE, f"{name}: {copy}: no target of make")

    def test_the_build_is_sent_what_make_reads(self):
        """Every file that the product is made of is sent, and nothing that is secret, data or a build."""
        context = dockerfile.Context(ROOT)
        sent = set(context.files())
        out = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "server", "storage", "engine",
                              "migrations", "Makefile", "LICENSE"], cwd=ROOT, check=True, stdout=subprocess.PIPE,
                             text=True).stdout
        included = re.findall(r"(?m)^include (.*)$", MAKEFILE)
        self.assertTrue(included)
        wanted = {p for p in out.splitlines() if (ROOT / p).exists()} | set(" ".join(included).split())
        self.assertEqual(wanted - sent, set())
        for path in ("build/graft", ".cache/data/pg/PG_VERSION", ".git/config", "docker/secrets/database_url",
                     "tests/run", "docker/compose.yaml"):
            self.assertFalse(context.sends(path), path)

    def test_only_a_build_stage_has_compilers_and_headers(self):
        for name in FILES:
            build, run = map(dockerfile.packages, stages(name))
            self.assertIn("make", build)
            self.assertEqual([p for p in run if p.endswith("-dev") or p in build], [])

    def test_packages_are_those_of_the_installer(self):
        out = subprocess.run([ROOT / "tests/deps/install.sh", "all", "--list"], check=True, stdout=subprocess.PIPE,
                             text=True).stdout.split()
        for name in FILES:
            self.assertEqual(set(dockerfile.packages(stages(name)[0])) - set(out), set())

    def test_the_cuda_image_has_the_packages_of_the_other(self):
        cpu, cuda = (stages(name) for name in FILES)
        self.assertEqual([UBUNTU_NAMES.get(p, p) for p in dockerfile.packages(cpu[1])], dockerfile.packages(cuda[1]))
        self.assertEqual(set(dockerfile.packages(cuda[0])) - set(dockerfile.packages(cpu[0])), {"g++"})

    def test_the_cuda_image_builds_with_the_toolkit_and_runs_with_its_libraries(self):
        build, run = stages("Dockerfile.cuda")
        self.assertRegex(build.base, r"^nvidia/cuda:[\d.]+-devel-ubuntu24\.04@")
        # `base` has no cuBLAS; `runtime` has.
        self.assertRegex(run.base, r"^nvidia/cuda:[\d.]+-runtime-ubuntu24\.04@")
        self.assertEqual(build.base.split("-")[0], run.base.split("-")[0], "both stages have one version of CUDA")
        self.assertIn("CUDA=1", build.last("RUN").text)

    def test_the_same_image_but_for_the_backend(self):
        def shape(name):
            return [(i.name, i.text) for i in stages(name)[1].instructions
                    if not (i.name == "RUN" and "apt-get" in i.text) and "libgraft_cuda" not in i.text]
        self.assertEqual(shape("Dockerfile.cpu"), shape("Dockerfile.cuda"))

    def test_it_runs_as_nobody_in_particular_and_says_how_it_is(self):
        flags, variables = known_settings("serve")
        for name in FILES:
            run = stages(name)[1]
            user, _, group = run.last("USER").text.partition(":")
            self.assertTrue(int(user) > 0 and int(group) > 0, "by number, so that it is known not to be root")
            self.assertEqual(run.last("ENTRYPOINT").words, ["graft"])
            self.assertTrue(run.last("ENTRYPOINT").is_exec_form and run.last("CMD").is_exec_form,
                            "a shell between would keep signals from graft")
            self.assertIn(run.last("CMD").words[0], commands())
            self.assertEqual(run.last("VOLUME").text, "/data")
            self.assertRegex(run.last("HEALTHCHECK").text, r'CMD \["graft-healthcheck"\]$')
            given = dict(w.split("=", 1) for e in run.all("ENV") for w in e.words)
            self.assertEqual(set(given) - variables, set())
            self.assertEqual((given["GRAFT_DATA"], given["GRAFT_LISTEN"].split(":")[-1]),
                             ("/data", run.last("EXPOSE").text))

    def test_the_health_check_asks_for_a_route_that_there_is(self):
        script = DOCKER / "healthcheck.sh"
        self.assertTrue(script.stat().st_mode & stat.S_IXUSR)
        (route,) = re.findall(r'/[a-z]+"$', script.read_text(), re.M)
        self.assertIn(f'"{route}', (ROOT / "server/api_routes.c").read_text())

    def test_runtime_packages_hold_the_libraries_of_the_program(self):
        """Each library that the binary names is of one of the packages, or of the C library."""
        if "bookworm" not in pathlib.Path("/etc/os-release").read_text() or not shutil.which("dpkg"):
            self.skipTest("this is not Debian 12, whose packages the CPU image has")
        out = subprocess.run(["ldd", GRAFT], check=True, stdout=subprocess.PIPE, text=True).stdout
        where = dict(re.findall(r"^\s*(\S+) => (\S+)", out, re.M))
        head = subprocess.run(["objdump", "-p", GRAFT], check=True, stdout=subprocess.PIPE, text=True).stdout
        have = set(dockerfile.packages(stages("Dockerfile.cpu")[1])) | {"libc6"}
        for library in re.findall(r"NEEDED\s+(\S+)", head):
            path = pathlib.Path(where[library]).resolve()
            found = ""
            for candidate in (path, str(path).removeprefix("/usr")):  # dpkg knows files by the name they came with
                found = found or subprocess.run(["dpkg", "-S", candidate], stdout=subprocess.PIPE,
                                                stderr=subprocess.DEVNULL, text=True).stdout
            self.assertIn(found.split(":")[0], have, f"{library} is {path}")

    def test_debian_has_the_packages(self):
        if "bookworm" not in pathlib.Path("/etc/os-release").read_text() or not shutil.which("apt-cache"):
            self.skipTest("this is not Debian 12, whose packages the CPU image has")
        for name in (p for stage in stages("Dockerfile.cpu") for p in dockerfile.packages(stage)):
            out = subprocess.run(["apt-cache", "policy", name], check=True, stdout=subprocess.PIPE, text=True).stdout
            self.assertRegex(out, r"Candidate: \d", f"{name} is not known (apt-get update?)")


class Compose(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        try:
            import yaml
        except ImportError as problem:
            raise unittest.SkipTest("python3-yaml is not installed (make deps)") from problem
        cls.text = (DOCKER / "compose.yaml").read_text()
        cls.file = yaml.safe_load(cls.text)
        cls.services = cls.file["services"]
        cls.ours = {name: s for name, s in cls.services.items() if s["image"].startswith("graft")}

    def test_api_database_and_worker(self):
        self.assertEqual(set(self.services), {"postgres", "api", "worker"})
        self.assertEqual(set(self.ours), {"api", "worker"})

    def test_only_keys_that_compose_has(self):
        known = {"image", "build", "command", "environment", "secrets", "volumes", "ports", "depends_on", "healthcheck",
                 "restart", "stop_grace_period", "read_only", "tmpfs", "cap_drop", "security_opt"}
        for name, service in self.services.items():
            self.assertEqual(set(service) - known, set(), name)
        self.assertEqual({k for k in self.file if not k.startswith("x-")}, {"name", "services", "secrets", "volumes"})

    def test_each_command_variable_and_flag_is_one_of_grafts(self):
        default = stages("Dockerfile.cpu")[1].last("CMD").words
        for name, service in self.ours.items():
            command, *rest = service.get("command", default)
            self.assertIn(command, commands(), name)
            flags, variables = known_settings(command)
            self.assertEqual({w.partition("=")[0] for w in rest if w.startswith("--")} - flags, set(), name)
            given = {k for k in service["environment"] if k.startswith("GRAFT_")}
            self.assertEqual(given - variables, set(), name)
            self.assertTrue(all(isinstance(v, str) for v in service["environment"].values()), "quoted: compose passes text")

    def test_the_api_leaves_training_to_the_worker(self):
        self.assertEqual(self.ours["api"]["environment"]["GRAFT_WORKERS"], "0")
        self.assertEqual(self.ours["worker"]["command"], ["work", "--role", "train"])
        mounts = [v for s in self.ours.values() for v in s["volumes"]]
        self.assertEqual(mounts, ["data:/data"] * 2, "both see the same blobs")

    def test_secrets_come_as_files(self):
        self.assertNotRegex(self.text, r"postgres(ql)?://")
        for name, service in self.services.items():
            for key, value in service.get("environment", {}).items():
                if "PASSWORD" in key or "DATABASE" in key:
                    self.assertTrue(key.endswith("_FILE"), f"{name}: {key}")
                    self.assertIn(value.removeprefix("/run/secrets/"), service["secrets"])
            self.assertEqual(set(service.get("secrets", [])) - set(self.file["secrets"]), set())

    def test_what_is_named_is_declared(self):
        for name, service in self.services.items():
            for other, how in service.get("depends_on", {}).items():
                self.assertIn(other, self.services)
                self.assertEqual(how["condition"], "service_healthy")
                self.assertNotEqual(self.services[other].get("healthcheck"), {"disable": True}, "it is never healthy")
            for volume in service["volumes"]:
                source = volume.split(":")[0]
                if source.startswith("."):
                    self.assertTrue((DOCKER / source).exists(), source)
                else:
                    self.assertIn(source, self.file["volumes"])
            if "build" in service:
                self.assertTrue((DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file())
        self.assertRegex(self.services["postgres"]["image"], PINNED)

    def test_the_api_is_not_opened_to_the_world(self):
        self.assertEqual(self.ours["api"]["ports"], ["127.0.0.1:8080:8080"])
        self.assertNotIn("ports", self.ours["worker"])
        self.assertNotIn("ports", self.services["postgres"])

    def test_a_drain_has_the_time_it_takes(self):
        flags = subprocess.run([GRAFT, "help", "serve"], check=True, stdout=subprocess.PIPE, text=True).stdout
        drain = int(re.search(r"--drain .*\(default (\d+)\)", flags).group(1))
        for service in self.ours.values():
            self.assertGreater(int(service["stop_grace_period"].rstrip("s")), drain)

    def test_docker_reads_it(self):
        if not shutil.which("docker") or subprocess.run(["docker", "compose", "version"], stdout=subprocess.DEVNULL,
                                                        stderr=subprocess.DEVNULL).returncode != 0:
            self.skipTest("docker compose is not at hand: the file was checked by this test's own rules alone")
        done = subprocess.run(["docker", "compose", "-f", DOCKER / "compose.yaml", "config", "--quiet"],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.assertEqual(done.returncode, 0, done.stdout)


class Secrets(unittest.TestCase):
    def test_they_are_made_once(self):
        with tempfile.TemporaryDirectory() as folder:
            script = shutil.copy(DOCKER / "secrets.sh", folder)
            made = pathlib.Path(folder) / "secrets"
            texts = []
            for _ in range(2):
                subprocess.run([script], check=True, stdout=subprocess.DEVNULL)
                texts.append([(made / n).read_text() for n in ("database_url", "postgres_password")])
            self.assertEqual(made.stat().st_mode & 0o777, 0o700)
            self.assertEqual(texts[0], texts[1])
            self.assertRegex(texts[0][0], r"^postgresql://graft:[0-9a-f]{48}@postgres:5432/graft\n$")
            self.assertRegex(texts[0][1], r"^[0-9a-f]{48}$")
            self.assertNotIn(texts[0][1], texts[0][0])
            self.assertEqual({f.stat().st_mode & 0o777 for f in made.iterdir()}, {0o644})

    def test_git_leaves_them_out(self):
        done = subprocess.run(["git", "check-ignore", "-q", "docker/secrets/database_url"], cwd=ROOT)
        self.assertEqual(done.returncode, 0)


class Readme(unittest.TestCase):
    text = (DOCKER / "README.md").read_text()

    def test_commands_name_what_there_is(self):
        code = "\n".join(re.findall(r"```(?:sh)?\n(.*?)```", self.text, re.S))
        for path in re.findall(r"\bdocker/[\w.]+", code):
            self.assertTrue((ROOT / path).exists() or path == "docker/secrets", path)
        compose = (DOCKER / "compose.yaml").read_text()
        for service in re.findall(r"(?:exec|run --rm(?: -v \S+)?|logs) (api|worker|postgres)\b", code):
            self.assertIn(f"\n  {service}:\n", compose)
        known = commands()
        calls = re.findall(r"(?:graft|api) ((?:key|model) [a-z]+)((?: [^\s|]+)*)", code)
        self.assertTrue(calls)
        for command, rest in calls:
            self.assertIn(command, known)
            flags, _ = known_settings(command)
            self.assertEqual(set(re.findall(r"--[a-z-]+", rest)) - flags, set(), command)

    def test_named_variables_exist(self):
        _, variables = known_settings("serve")
        self.assertEqual(set(re.findall(r"GRAFT_[A-Z_]+", self.text)) - variables, set())

    def test_named_targets_exist(self):
        for target in re.findall(r"`make ([a-z-]+)", self.text):
            self.assertTrue(re.search(rf"^{target}:", MAKEFILE, re.M), target)


if __name__ == "__main__":
    unittest.main()
