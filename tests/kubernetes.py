#!/usr/bin/env python3
"""Plays a cluster with examples/kubernetes.yaml: the API server's part (fields and types), the kubelet's (starts the
container's command, as its user; probes, preStop, SIGTERM, SIGKILL when the grace is over), the deployment
controller's (replaces two pods, a new one ready before an old one is told), and the Service's, which is HAProxy here:
a ready pod by chance for each connection, and no second try. Clients ask all the while, and none may fail. Once as
the file is, and once as its last comment has it, with a load balancer that sends PROXY headers.

  python3 tests/kubernetes.py         environment: BUILD CC PATIENCE (seconds for a step)

A pod has an address of its own, of 127.0.0.0/8, and there the ports of the file. Needs python3-yaml, haproxy, and for
the types: npm install --no-save --prefix build/types typescript@5.9.3 kubernetes-models@5.1.0
What is missing is a failure with CI=true."""
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
BUILD = os.environ.get("BUILD", "build")
CC = os.environ.get("CC", "cc").split()
PATIENCE = float(os.environ.get("PATIENCE", 30))
GRACE = 30  # seconds: grace_ms of the library, which the example leaves as it is
CUT = 5  # seconds that the library may need behind it
LAG = 1.5  # seconds until a node knows of a change of the endpoints
counts = {"passed": 0, "failed": 0, "skipped": 0}


def result(good, text, *details):
    counts["passed" if good else "failed"] += 1
    print(("ok   " if good else "FAIL ") + text, flush=True)
    for detail in [] if good else details:
        print("     " + str(detail).rstrip().replace("\n", "\n     "), flush=True)
    return good


def skip(text):
    counts["failed" if os.environ.get("CI") == "true" else "skipped"] += 1
    print("SKIP " + text)


def summary():
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**counts))
    sys.exit(counts["failed"] != 0)


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


# ---- the API server's part


def check_types(documents):
    """Kubernetes' own types, as kubernetes-models has them: no unknown field, no wrong value, none missing."""
    types = os.path.join(BUILD, "types")
    compiler = os.path.join(types, "node_modules/.bin/tsc")
    if not os.path.exists(compiler):
        return skip("types: no " + compiler)
    with open(os.path.join(types, "kubernetes.ts"), "w") as file:
        for i, d in enumerate(documents):
            file.write(f"import type {{I{d['kind']} as T{i}}} from 'kubernetes-models/{d['apiVersion']}/{d['kind']}'\n"
                       f"export const d{i}: T{i} = {json.dumps(d, indent=1)}\n")
    told = subprocess.run([compiler, "--noEmit", "--strict", "--module", "nodenext", "--skipLibCheck", file.name],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if not result(told.returncode == 0, "Kubernetes' types have all fields, with such values", told.stdout):
        summary()


def check_fields(deployment, service):
    """What belongs together, and what the API server refuses though the type is right."""
    spec = deployment["spec"]
    pod = spec["template"]["spec"]
    labels = spec["template"]["metadata"]["labels"].items()
    container = pod["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    probes = [container["readinessProbe"], container["livenessProbe"]]
    names = [d["metadata"]["name"] for d in (deployment, service)] + [container["name"]] + list(ports)
    result(spec["selector"]["matchLabels"].items() <= labels, "the deployment selects its own pods")
    result(service["spec"]["selector"].items() <= labels, "the service selects the deployment's pods")
    result(all(re.fullmatch("[a-z]([a-z0-9-]{0,13}[a-z0-9])?", name) for name in names), "names are names", names)
    result([ports[p["targetPort"]] for p in service["spec"]["ports"]] == [int(container["args"][0])],
           "the service goes to the program's port, and not to its admin port")
    result(all(ports[probe["httpGet"]["port"]] == int(container["args"][1]) for probe in probes),
           "probes go to the program's admin port")
    result(spec["template"]["metadata"]["annotations"]["prometheus.io/port"] == container["args"][1],
           "Prometheus goes there too")
    result(all(1 <= probe["timeoutSeconds"] <= probe["periodSeconds"] and probe["failureThreshold"] >= 1
               for probe in probes) and "successThreshold" not in probes[1], "the probes' times fit")
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    result(command[0] == "sleep" and
           int(command[1]) + GRACE + CUT < pod["terminationGracePeriodSeconds"],
           "preStop, the drain and what is cut behind it fit the grace, and it does not end at the same moment")
    rolling = spec["strategy"]["rollingUpdate"]
    result(rolling["maxUnavailable"] == 0 and rolling["maxSurge"] >= 1 and spec["replicas"] >= 2,
           "a new pod comes before an old one goes")


# ---- the service's part


class Service:
    """HAProxy as a ClusterIP: its servers are the endpoints."""

    def __init__(self, directory, port, option):
        self.port = port
        self.socket = os.path.join(directory, "haproxy.sock")
        self.lock = threading.Lock()
        config = os.path.join(directory, "haproxy.cfg")
        with open(config, "w") as file:
            file.write(f"""global
    stats socket {self.socket} level admin
defaults
    mode tcp
    timeout connect 2s
    timeout client 70s
    timeout server 70s
    retries 0
listen service
    bind 127.0.0.1:{port}
    balance random
    server-template pod 1-9 127.0.0.1:1 disabled {option}
""")
        self.log = open(os.path.join(directory, "haproxy.log"), "w")
        self.process = subprocess.Popen(["haproxy", "-db", "-f", config], stdout=self.log, stderr=self.log)
        result(wait_until(lambda: os.path.exists(self.socket) and self.say("show info")), "HAProxy runs")

    def say(self, line):
        try:
            with self.lock, socket.socket(socket.AF_UNIX) as client:
                client.connect(self.socket)
                client.sendall((line + "\n").encode())
                return client.makefile().read()
        except OSError:
            return ""

    def add(self, pod):
        self.say(f"set server service/pod{pod.number} addr {pod.address} port {pod.ports['service']}")
        self.say(f"set server service/pod{pod.number} state ready")

    def remove(self, pod):
        self.say(f"set server service/pod{pod.number} state maint")

    def end(self):
        self.process.terminate()
        self.process.wait()
        self.log.close()


# ---- the kubelet's part


class Pod:
    def __init__(self, number, template, image, service, extra):
        spec = template["spec"]
        self.number, self.service, self.spec = number, service, spec
        self.container = container = spec["containers"][0]
        self.ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        self.address = "127.%d.%d.%d" % (os.getpid() >> 8 & 255, os.getpid() & 255, number)
        self.ready = self.deleted = False
        self.exit_code = self.seconds = None
        self.restarts = 0
        self.environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "POD_IP": self.address}
        for variable in container.get("env", []):
            self.environment[variable["name"]] = variable["value"]
        command = [image + container["command"][0]] + container["command"][1:] + container["args"] + extra
        user = spec["securityContext"]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid", str(user["runAsUser"]), "--regid", str(user["runAsGroup"]),
                       "--clear-groups", "--no-new-privs", "--bounding-set", "-all", "--inh-caps", "-all"] + command
        self.log_name = f"{image}/pod{number}.log"
        with open(self.log_name, "w") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        for name, use in (("readinessProbe", self.set_ready), ("livenessProbe", self.set_alive)):
            threading.Thread(target=self.probe, args=(container[name], use), daemon=True).start()

    def log(self):
        with open(self.log_name) as log:
            return log.read()

    def get(self, probe):
        """One connection for each probe. Returns the status, or None."""
        ask = probe["httpGet"]
        port = self.ports.get(ask["port"], ask["port"])
        client = http.client.HTTPConnection(self.address, port, timeout=probe.get("timeoutSeconds", 1))
        try:
            client.request("GET", ask["path"], headers={"Connection": "close"})
            return client.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            client.close()

    def probe(self, probe, use):
        bad = good = 0
        time.sleep(probe.get("initialDelaySeconds", 0))
        while self.process.poll() is None:
            status = self.get(probe)
            if status is not None and 200 <= status < 400:
                bad, good = 0, good + 1
            else:
                bad, good = bad + 1, 0
            if good >= probe.get("successThreshold", 1):
                use(True)
            elif bad >= probe.get("failureThreshold", 3):
                use(False)
            time.sleep(probe.get("periodSeconds", 10))

    def set_ready(self, ready):
        if ready != self.ready:
            self.ready = ready
            if ready and not self.deleted:
                self.service.add(self)
            elif not ready:
                self.service.remove(self)

    def set_alive(self, alive):
        self.restarts += not alive and not self.deleted  # it would be killed, and started again

    def delete(self):
        """As the API server has it: the endpoint goes and preStop begins at once, though the nodes hear later."""
        begun = time.monotonic()
        self.deleted = True
        threading.Timer(LAG, self.service.remove, [self]).start()
        command = self.container["lifecycle"]["preStop"]["exec"]["command"]
        hook = subprocess.run(command, env=self.environment, timeout=self.spec["terminationGracePeriodSeconds"])
        self.process.send_signal(signal.SIGTERM)
        try:
            left = self.spec["terminationGracePeriodSeconds"] - (time.monotonic() - begun)
            self.exit_code = hook.returncode or self.process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.exit_code = self.process.wait()
        self.seconds = time.monotonic() - begun

    def signal(self, number):
        """To all of its processes."""
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], stdout=subprocess.PIPE).stdout.split()
        for pid in [self.process.pid] + [int(child) for child in children]:
            os.kill(pid, number)


def watch_readyz(pod, seen):
    """Somebody who keeps a connection to the admin port, and asks five times a second."""
    probe = pod.container["readinessProbe"]["httpGet"]
    client = http.client.HTTPConnection(pod.address, pod.ports[probe["port"]], timeout=5)
    try:
        while True:
            client.request("GET", probe["path"])
            answer = client.getresponse()
            answer.read()
            seen.append(answer.status)
            if answer.will_close:
                return
            time.sleep(0.2)
    except (OSError, http.client.HTTPException) as error:
        seen.append(error)


# ---- the deployment controller's part


def update(name, pods, new_pod):
    """Replaces each of the pods, as maxSurge 1 and maxUnavailable 0 have it."""
    new, watchers, deletes = [], [], []
    for old in pods:
        seen = []
        watchers.append((threading.Thread(target=watch_readyz, args=(old, seen), daemon=True), seen))
        watchers[-1][0].start()
        new.append(new_pod())
        result(wait_until(lambda: new[-1].ready), f"{name}: pod {new[-1].number} is ready", new[-1].log())
        deletes.append(threading.Thread(target=old.delete))
        deletes[-1].start()
    limit = pods[0].spec["terminationGracePeriodSeconds"]
    for old, thread, (watcher, seen) in zip(pods, deletes, watchers):
        thread.join()
        watcher.join(PATIENCE)
        result(old.exit_code == 0 and old.seconds < limit,
               f"{name}: pod {old.number} has ended with {old.exit_code} after {old.seconds:.0f} of {limit} s",
               old.log())
        result(seen[-1] == 503 and set(seen[:-1]) == {200},
               f"{name}: pod {old.number} says in its drain, /readyz: {seen[-1]}", seen)
    return new


def run(name, documents, image, directory, extra, option):
    deployment = documents[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = Service(directory, port, option)
    made = []

    def new_pod():
        made.append(Pod(len(made) + 1, deployment["spec"]["template"], image, service, extra))
        return made[-1]

    load = None
    try:
        pods = [new_pod() for _ in range(deployment["spec"]["replicas"])]
        for pod in pods:
            result(wait_until(lambda pod=pod: pod.ready), f"{name}: pod {pod.number} is ready", pod.log())
        hang(name, pods[0], service)
        if extra:
            result(stranger_is_refused(pods[0]), f"{name}: who has no header is refused", pods[0].log())
        load = subprocess.Popen([directory + "/rolling_load", str(port), "8", "4"], stdout=subprocess.PIPE,
                                universal_newlines=True)
        time.sleep(1)
        pods = update(name, pods, new_pod)
        time.sleep(1)
        load.terminate()
        told = load.communicate()[0].splitlines()
        result(load.returncode == 0 and told[-1].endswith(" 0 failed"), f"{name}: {told[-1]}", *told[:12])
        result(int(told[-1].split(", ")[2].split()[0]) > 0, f"{name}: clients that stay heard the good-byes")
        result(all(pod.restarts == 0 for pod in made), f"{name}: nobody was restarted by the liveness probe")
    finally:
        if load is not None and load.poll() is None:
            load.kill()
        for pod in made:
            if pod.process.poll() is None:
                pod.process.terminate()
                pod.process.wait()
        service.end()


def hang(name, pod, service):
    """A pod that answers nobody for a moment gets no connections meanwhile, and is not restarted."""
    pod.signal(signal.SIGSTOP)
    gone = wait_until(lambda: not pod.ready)
    pod.signal(signal.SIGCONT)
    back = wait_until(lambda: pod.ready)
    state = service.say("show servers state service")
    result(gone and back and pod.restarts == 0, f"{name}: pod {pod.number} hung, left the endpoints, and came back",
           f"gone {gone}, back {back}, {pod.restarts} restarts", state)


def stranger_is_refused(pod):
    with socket.create_connection((pod.address, pod.ports["service"]), timeout=PATIENCE) as client:
        try:
            client.sendall(b"hello\n")
            return client.recv(100) == b""
        except ConnectionResetError:
            return True


def main():
    try:
        import yaml
    except ImportError:
        skip("all of it: no python3-yaml")
        summary()
    with open("examples/kubernetes.yaml") as file:
        documents = list(yaml.safe_load_all(file))
    result([d["kind"] for d in documents] == ["Deployment", "Service"], "it is a deployment and a service")
    check_types(documents)
    check_fields(*documents)
    for tool in "haproxy", "setpriv", "pgrep":
        if shutil.which(tool) is None:
            skip("pods: no " + tool)
            summary()
    directory = os.path.abspath(os.path.join(BUILD, "kubernetes"))
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    # The image: the program is where the file says, and everybody may run it. It listens on its pod's address.
    image = tempfile.mkdtemp()
    os.chmod(image, 0o755)
    program = image + documents[0]["spec"]["template"]["spec"]["containers"][0]["command"][0]
    os.makedirs(os.path.dirname(program))
    try:
        with open("examples/status.c") as source:
            text = source.read().replace('"127.0.0.1"', 'getenv("POD_IP")')
        subprocess.run(CC + ["-O1", "-Iexamples", "-x", "c", "-o", program, "-", "-lpthread"], input=text, check=True,
                       universal_newlines=True)
        subprocess.run(CC + ["-std=gnu99", "-O1", "-o", directory + "/rolling_load", "tests/rolling_load.c",
                             "-lpthread"], check=True)
        run("as it is", documents, image, directory, [], "")
        run("PROXY headers", documents, image, directory, ["127.0.0.1"], "send-proxy-v2")
    finally:
        shutil.rmtree(image)
    summary()


main()
