//! What containers ask of the runner beside the network: who they are, and what they are given.

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
