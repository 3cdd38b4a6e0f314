//! Policy on server names, which is told from the first bytes of a connection that nobody opens:
//! real curl, and servers that count what arrives.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{
    harness::{Lab, Pod},
    l7::service,
};

const PORT: u16 = 8443;

const EGRESS: &str = "spec: {endpointSelector: {matchLabels: {app: near}}, egress: [{
    toEndpoints: [{matchLabels: {app: server}}],
    toPorts: [{ports: [{port: '8443', protocol: TCP}], serverNames: [api.example.com, '*.cdn.example.com']}]}]}";
const INGRESS: &str = "spec: {endpointSelector: {matchLabels: {app: server}}, ingress: [{
    fromEndpoints: [{}],
    toPorts: [{ports: [{port: '8443', protocol: TCP}], serverNames: [api.example.com, '*.cdn.example.com']}]}]}";

/// A stream that counts what it reads.
struct Counted(TcpStream, Arc<AtomicU64>);

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.0.read(buffer)?;
        self.1.fetch_add(u64::try_from(length).unwrap(), Relaxed);
        Ok(length)
    }
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Serves `yes` to everybody; the bytes that arrived, of whatever kind.
fn serve(pod: &Pod) -> Arc<AtomicU64> {
    let key = rcgen::generate_simple_self_signed(["api.example.com".to_owned()]).unwrap();
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![key.cert.der().clone()], private)
        .unwrap();
    let (config, arrived) = (Arc::new(config), Arc::<AtomicU64>::default());
    let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT));
    let listener = pod.run(move || TcpListener::bind(at));
    let counter = arrived.clone();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let session = ServerConnection::new(config.clone()).unwrap();
            let stream = StreamOwned::new(session, Counted(stream, counter.clone()));
            // A client that goes away is no concern of the server.
            thread::spawn(move || answer(stream));
        }
    });
    arrived
}

fn answer(mut stream: StreamOwned<ServerConnection, Counted>) -> io::Result<()> {
    let mut buffer = [0; 4096];
    _ = stream.read(&mut buffer)?;
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nyes")?;
    stream.conn.send_close_notify();
    stream.flush()
}

/// What curl says to a server of this name, or of none, at the address: its exit status and output.
fn curl(from: &Pod, name: Option<&str>, to: IpAddr) -> (Option<i32>, String) {
    let at = SocketAddr::new(to, PORT);
    let (url, resolve) = match name {
        Some(name) => {
            let host = at.to_string().trim_end_matches(&format!(":{PORT}")).to_owned();
            (format!("https://{name}:{PORT}/"), format!("{name}:{PORT}:{host}"))
        }
        None => (format!("https://{at}/"), "unused:1:[::1]".to_owned()),
    };
    let arguments = ["-sgk", "--max-time", "10", "--resolve", &resolve, &url].map(str::to_owned);
    let output = from.run(move || Command::new("curl").args(arguments).output());
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn server_names_decide_and_nothing_of_the_others_arrives() {
    /// A connection that the other end reset, while TLS was being agreed on or before.
    const RESET: [Option<i32>; 2] = [Some(35), Some(56)];
    let lab = Lab::up(2);
    let [server, near, far] = lab.pods([("server", 1), ("near", 1), ("far", 2)]);
    let arrived = serve(&server);
    let to: Vec<IpAddr> = server.addresses.into_iter().chain(service(&lab, PORT)).collect();
    let yes = (Some(0), "yes".to_owned());
    for (policy, from) in [(EGRESS, [&near].as_slice()), (INGRESS, &[&near, &far])] {
        for to in &to {
            assert_eq!(curl(&near, Some("evil.example.com"), *to), yes, "{to} before the policy");
        }
        lab.apply_cilium_policy("default", "names", policy);
        for (from, to) in from.iter().flat_map(|from| to.iter().map(move |to| (from, *to))) {
            for name in ["api.example.com", "API.example.COM", "a.cdn.example.com"] {
                assert_eq!(curl(from, Some(name), to), yes, "{name} at {to}: {policy}");
            }
            let before = arrived.load(Relaxed);
            let others = ["evil.example.com", "a.b.cdn.example.com", "api.example.com.evil.org"];
            for name in others.map(Some).into_iter().chain([None]) {
                let (status, text) = curl(from, name, to);
                assert!(RESET.contains(&status), "{name:?} at {to}: {status:?} {text}, {policy}");
            }
            assert_eq!(arrived.load(Relaxed), before, "nothing arrives: {to}, {policy}");
        }
        lab.kubectl(&["delete", "cnp", "names"]);
        lab.await_policies(0);
    }
}
