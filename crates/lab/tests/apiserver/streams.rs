//! `kubectl port-forward`: many connections over one.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use super::{Cluster, default_namespace, start};

const CONNECTIONS: u8 = 20;
/// More than all buffers on the way.
const LENGTH: usize = 3_000_000;
/// Nothing may wait for ever.
const SOON: Duration = Duration::from_secs(20);

/// A running `kubectl port-forward`.
struct Forwarding {
    kubectl: Child,
    /// Where it listens.
    port: u16,
}

/// Ends a `kubectl` that did not do what it was told to.
fn complaints(kubectl: &mut Child) -> String {
    kubectl.kill().unwrap();
    let mut text = String::new();
    kubectl.stderr.as_mut().unwrap().read_to_string(&mut text).unwrap();
    text
}

impl Forwarding {
    fn start(cluster: &Cluster, to: u16) -> Self {
        let mut kubectl = cluster
            .kubectl(&["port-forward", "pod/client", &format!(":{to}")])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(kubectl.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let port = line
            .strip_prefix("Forwarding from 127.0.0.1:")
            .and_then(|rest| rest.split(' ').next()?.parse().ok());
        assert!(port.is_some(), "{line}{}", complaints(&mut kubectl));
        let port = port.unwrap();
        Self { kubectl, port }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        stream
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        let _ = self.kubectl.kill();
        let _ = self.kubectl.wait();
    }
}

/// Says everything back, and ends when the other side has.
fn serve_echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut back = stream.try_clone().unwrap();
                let _ = std::io::copy(&mut stream, &mut back);
                let _ = back.shutdown(Shutdown::Write);
            });
        }
    });
    port
}

fn running_pod(cluster: &Cluster) {
    default_namespace(cluster);
    cluster.ok("run client --image=example.com/client", "");
    cluster.ok(
        "patch pod client --subresource=status --type=merge -p {\"status\":{\"phase\":\"Running\"}}",
        "",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_are_forwarded() {
    let cluster = start("forward");
    if cluster.kubectl.is_none() {
        eprintln!("SKIPPED: no kubectl in PALISADE_KUBECTL, .tools/bin or PATH");
        return;
    }
    running_pod(&cluster);
    let forwarding = Forwarding::start(&cluster, serve_echo());
    thread::scope(|scope| {
        for number in 0..CONNECTIONS {
            let forwarding = &forwarding;
            scope.spawn(move || {
                let stream = forwarding.connect();
                let mut writer = stream.try_clone().unwrap();
                let sent: Vec<u8> = (0..LENGTH).map(|at| (at % 251) as u8 ^ number).collect();
                let expected = sent.clone();
                let writing = thread::spawn(move || writer.write_all(&sent).unwrap());
                let mut echoed = vec![0; LENGTH];
                (&stream).read_exact(&mut echoed).unwrap();
                assert!(echoed == expected, "connection {number} carries another's bytes");
                writing.join().unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                assert_eq!((&stream).read(&mut echoed).unwrap(), 0, "it ends with its other end");
            });
        }
    });
    // The way of one that breaks off is free again.
    drop(forwarding.connect());
    let mut last = forwarding.connect();
    last.write_all(b"x").unwrap();
    last.read_exact(&mut [0]).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_where_nobody_listens_is_told() {
    let cluster = start("refused");
    if cluster.kubectl.is_none() {
        eprintln!("SKIPPED: no kubectl in PALISADE_KUBECTL, .tools/bin or PATH");
        return;
    }
    running_pod(&cluster);
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut forwarding = Forwarding::start(&cluster, closed);
    let mut stream = forwarding.connect();
    assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
    // kubectl gives up when a pod refuses.
    let mut said = String::new();
    let _ = forwarding.kubectl.stderr.take().unwrap().read_to_string(&mut said);
    assert!(said.contains(&format!("port {closed}: Connection refused")), "{said}");

    let refusal = cluster.refused("port-forward pod/nosuch 8080:80", "");
    assert!(refusal.contains("pods \"nosuch\" not found"), "{refusal}");
}
