//! What containers ask of the runner beside the network: who they are, and what they are given.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv6Addr, TcpListener, TcpStream},
    process::{Child, Stdio},
};

use serde_json::Value;

use super::harness::{Lab, eventually};

const MANIFEST: &str = r"
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {COLOUR: green, SIZE: small}
---
apiVersion: v1
kind: Secret
metadata: {name: keys}
stringData: {token: abc}
---
apiVersion: v1
kind: Pod
metadata: {name: somebody}
spec:
  securityContext: {runAsUser: 1000, runAsGroup: 2000, supplementalGroups: [3000], runAsNonRoot: true}
  containers:
  - name: main
    image: docker.io/library/busybox
    command: [sh, -c, 'echo started as $(id -u):$(id -g) > /dev/stdout; trap exit TERM; sleep infinity & wait']
    securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true}
    env: [{name: SIZE, value: large}]
    envFrom:
    - configMapRef: {name: settings}
    - {prefix: KEY_, secretRef: {name: keys}}
    - configMapRef: {name: missing, optional: true}
    volumeMounts: [{name: all, mountPath: /all}, {name: scratch, mountPath: /scratch}]
  volumes:
  - name: all
    projected:
      sources:
      - configMap: {name: settings, items: [{key: COLOUR, path: paint/colour}]}
      - secret: {name: keys}
  - {name: scratch, emptyDir: {}}
---
apiVersion: v1
kind: Pod
metadata: {name: pretender}
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: docker.io/library/busybox
    securityContext: {runAsNonRoot: true}
---
apiVersion: v1
kind: Pod
metadata: {name: asks-too-much}
spec:
  containers: [{name: main, image: docker.io/library/busybox}]
  volumes: [{name: token, projected: {sources: [{serviceAccountToken: {path: token}}]}}]
";

#[test]
fn containers_are_who_they_ask_to_be() {
    let lab = Lab::up(1);
    lab.apply(MANIFEST);
    lab.kubectl(&["wait", "--for=condition=Ready", "pod/somebody", "--timeout=20s"]);
    let shell = |script: &str| {
        lab.try_kubectl(&["exec", "somebody", "--", "sh", "-c", script])
            .map(|output| output.trim_end().to_owned())
    };
    let says = |script: &str, expected: &str| {
        assert_eq!(shell(script).as_deref(), Some(expected), "{script}");
    };
    assert_eq!(lab.kubectl(&["logs", "somebody"]), "started as 1000:2000\n");
    says("id -u; id -g; id -G", "1000\n2000\n2000 3000");
    // Nothing is left to become root with, in the container's own process neither.
    says(
        "grep -E '^(CapEff|CapPrm|NoNewPrivs)' /proc/self/status | cut -f2 | tr '\\n' ' '",
        "0000000000000000 0000000000000000 1",
    );
    assert_eq!(shell("chown 0 /scratch"), None);
    assert_eq!(shell("cat /proc/1/environ"), None);
    assert_eq!(shell("echo x > /tmp/x"), None, "the root file system is read-only");
    says("echo x > /scratch/x && stat -c %u:%g /scratch/x", "1000:2000");
    says("echo $COLOUR $SIZE $KEY_token", "green large abc");
    says("cd /all; cat paint/colour token; ls", "greenabcpaint\ntoken");

    let pod = |name: &str| -> Value {
        serde_json::from_str(&lab.kubectl(&["get", "pod", name, "-o", "json"])).unwrap()
    };
    eventually("the refusal is in the pod's status", || {
        let message = &pod("pretender")["status"]["containerStatuses"][0]["state"]["terminated"];
        message["message"].as_str().is_some_and(|text| text.contains("runAsUser"))
    });
    eventually("the refusal is an event", || {
        let events = lab.kubectl(&["get", "events", "-o", "jsonpath={.items[*].message}"]);
        events.contains("projected.sources: the lab supports configMap and secret")
    });
    // The first process of the container is root and forwards the signal all the same.
    let begun = std::time::Instant::now();
    lab.kubectl(&["delete", "pod", "somebody"]);
    assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
}

const TALKATIVE: &str = r"
apiVersion: v1
kind: Pod
metadata: {name: screen}
spec:
  restartPolicy: Never
  containers:
  - {name: main, image: docker.io/library/busybox, command: [sh], stdin: true, tty: true}
---
apiVersion: v1
kind: Pod
metadata: {name: ticker}
spec:
  containers:
  - name: main
    image: docker.io/library/busybox
    command: [sh, -c, 'while sleep 0.1; do echo tick; echo tock >&2; done']
---
apiVersion: v1
kind: Pod
metadata: {name: reader}
spec:
  restartPolicy: Never
  containers:
  - {name: main, image: docker.io/library/busybox, command: [wc, -c], stdin: true}
";

/// What is typed goes to the container, what it says comes back, and leaving does it no harm.
#[test]
fn attaching_to_containers() {
    let lab = Lab::up(1);
    lab.apply(TALKATIVE);
    lab.kubectl(&["wait", "--for=condition=Ready", "pod", "--all", "--timeout=20s"]);
    let attach = |pod: &str, options: &[&str]| -> Child {
        let mut kubectl = lab.command(&[&["attach", pod], options].concat());
        kubectl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        kubectl.spawn().unwrap()
    };

    // Both streams, from now on.
    let mut watching = attach("ticker", &[]);
    for (stream, word) in [
        (Box::new(watching.stdout.take().unwrap()) as Box<dyn Read>, "tick"),
        (Box::new(watching.stderr.take().unwrap()), "tock"),
    ] {
        let lines = BufReader::new(stream).lines().map(Result::unwrap);
        let said: Vec<String> = lines.filter(|line| line.starts_with('t')).take(3).collect();
        assert_eq!(said, [word; 3]);
    }
    watching.kill().unwrap();
    watching.wait().unwrap();
    let restarts = "-o=jsonpath={.status.containerStatuses[0].restartCount}";
    assert_eq!(lab.kubectl(&["get", "pod", "ticker", restarts]), "0");

    // Who comes and goes does not end the input, unless the container wants it so.
    let mut typing = attach("reader", &["-i"]);
    typing.stdin.take().unwrap().write_all(b"12345").unwrap();
    typing.kill().unwrap();
    typing.wait().unwrap();
    assert_eq!(lab.kubectl(&["get", "pod", "reader", "-o=jsonpath={.status.phase}"]), "Running");

    // A terminal of its own: it echoes, and line ends are those of a terminal.
    let mut person = attach("screen", &["-i"]);
    let keys = b"test -t 0 && echo on $TERM\nexit 3\n";
    person.stdin.as_mut().unwrap().write_all(keys).unwrap();
    let output = person.wait_with_output().unwrap();
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && shown.contains("on xterm\r\n"), "{shown}");
    let code = "-o=jsonpath={.status.containerStatuses[0].state.terminated.exitCode}";
    eventually("the shell's end", || lab.kubectl(&["get", "pod", "screen", code]) == "3");

    // A pod for one command, as people use it every day.
    let command = "read word; echo got $word; echo whole >&2; cat | wc -c";
    let run = ["run", "once", "-iq", "--rm", "--restart=Never", "--image=busybox", "--"];
    let mut kubectl = lab.command(&[&run[..], &["sh", "-c", command]].concat());
    kubectl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut kubectl = kubectl.spawn().unwrap();
    let mut input = kubectl.stdin.take().unwrap();
    input.write_all(b"this\n").unwrap();
    input.write_all(&[b'x'; 300_000]).unwrap();
    drop(input);
    let output = kubectl.wait_with_output().unwrap();
    let [out, err] = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said));
    assert!(out.contains("got this\n300000\n"), "{out}{err}");
    assert!(err.contains("whole\n"), "{out}{err}");
    assert_eq!(lab.try_kubectl(&["get", "pod", "once"]), None);
}

/// What listens on a pod's loopback only can be reached by those who may, whatever policies say
/// of its network.
#[test]
fn forwarding_ports_of_pods() {
    let lab = Lab::up(1);
    let [pod] = lab.pods([("server", 1)]);
    lab.apply_policy("default", "closed", "{podSelector: {}, policyTypes: [Ingress, Egress]}");
    let listener = pod.run(|| TcpListener::bind((Ipv6Addr::LOCALHOST, 7000)));
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"hello").unwrap();
    });
    let mut kubectl = lab.command(&["port-forward", "pod/server", ":7000"]);
    let mut kubectl = kubectl.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(kubectl.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let port = line.strip_prefix("Forwarding from 127.0.0.1:").unwrap();
    let port: u16 = port.split(' ').next().unwrap().parse().unwrap();
    let mut said = String::new();
    TcpStream::connect(("127.0.0.1", port)).unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "hello");
    serving.join().unwrap();
    kubectl.kill().unwrap();
    kubectl.wait().unwrap();
}
