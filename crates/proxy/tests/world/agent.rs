//! The agent, as the proxy sees it.

use std::{
    io::{Read, Write},
    net::IpAddr,
    os::unix::{
        fs::chown,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    thread,
};

use palisade_api::proxy::{
    AccessRecord, Endpoint, FromProxy, Hello, Message, Peer, Rules, SOCKET, ToProxy, USER, VERSION,
    decode, encode,
};
use palisade_policy::{
    Chunk, CompiledPolicy, NamedPorts, RuleInfo, RuleSource,
    l7::{HttpRule, Pattern},
    model::{Action, Application, PolicyKind, PolicyRef},
};

use super::{CLIENT4, CLIENT6, SERVER4, SERVER6, WAIT};

pub(crate) struct Agent {
    listener: Mutex<UnixListener>,
    path: PathBuf,
    write: Mutex<Option<UnixStream>>,
    heard: Arc<(Mutex<Heard>, Condvar)>,
}

#[derive(Default)]
struct Heard {
    acknowledged: Option<u64>,
    records: Vec<AccessRecord>,
    learns: Vec<Learn>,
}

/// What the proxy wants learned.
#[derive(Clone, Debug)]
pub(crate) struct Learn {
    pub(crate) id: u64,
    pub(crate) client: IpAddr,
    pub(crate) name: String,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) ttl: u32,
}

impl Agent {
    pub(crate) fn listen(directory: &Path) -> Self {
        let path = directory.join(SOCKET);
        let listener = Mutex::new(bind(&path));
        Self { listener, path, write: Mutex::default(), heard: Arc::default() }
    }

    /// Waits for the proxy to connect.
    pub(crate) fn accept(&self) {
        let (stream, _) = self.listener.lock().unwrap().accept().unwrap();
        let mut read = stream.try_clone().unwrap();
        let mut buffer = Vec::new();
        let hello: Hello = next(&mut read, &mut buffer).unwrap();
        assert_eq!(hello.version, VERSION);
        let mut write = stream;
        write.write_all(&encode(&Hello { version: VERSION }).unwrap()).unwrap();
        *self.write.lock().unwrap() = Some(write);
        let heard = Arc::clone(&self.heard);
        thread::spawn(move || {
            while let Some(message) = next(&mut read, &mut buffer) {
                let mut state = heard.0.lock().unwrap();
                match message {
                    FromProxy::Ack { version } => state.acknowledged = Some(version),
                    FromProxy::Records(records) => {
                        state.records.extend(records.into_records().map(Result::unwrap));
                    }
                    FromProxy::Learn { id, client, name, addresses, ttl } => {
                        state.learns.push(Learn { id, client, name, addresses, ttl });
                    }
                }
                heard.1.notify_all();
            }
        });
    }

    pub(crate) fn send(&self, message: &ToProxy) {
        let mut write = self.write.lock().unwrap();
        write.as_mut().unwrap().write_all(&encode(message).unwrap()).unwrap();
    }

    /// Puts rules in force.
    pub(crate) fn put(&self, rules: Rules) {
        let version = rules.version;
        self.send(&ToProxy::Snapshot(rules));
        self.acknowledged(version);
    }

    /// Waits until a version is in force.
    pub(crate) fn acknowledged(&self, version: u64) {
        self.wait(|heard| (heard.acknowledged == Some(version)).then_some(()));
    }

    /// Whether it is.
    pub(crate) fn is_acknowledged(&self, version: u64) -> bool {
        self.heard.0.lock().unwrap().acknowledged == Some(version)
    }

    /// Waits for a record.
    pub(crate) fn record(&self, wanted: impl Fn(&AccessRecord) -> bool) -> AccessRecord {
        self.wait(|heard| heard.records.iter().find(|record| wanted(record)).cloned())
    }

    /// Waits for the next thing that the proxy wants learned.
    pub(crate) fn learn(&self) -> Learn {
        let (state, changed) = &*self.heard;
        let (mut state, late) = changed
            .wait_timeout_while(state.lock().unwrap(), WAIT, |heard| heard.learns.is_empty())
            .unwrap();
        assert!(!late.timed_out(), "the proxy wants nothing learned");
        state.learns.remove(0)
    }

    /// What the proxy wanted learned and nobody looked at.
    pub(crate) fn unheard(&self) -> Vec<Learn> {
        self.heard.0.lock().unwrap().learns.clone()
    }

    /// The agent dies: the proxy is on its own until [`Agent::come_back`].
    pub(crate) fn hang_up(&self) {
        std::fs::remove_file(&self.path).unwrap();
        if let Some(stream) = self.write.lock().unwrap().take() {
            stream.shutdown(std::net::Shutdown::Both).unwrap();
        }
    }

    /// The agent is there again.
    pub(crate) fn come_back(&self) {
        *self.listener.lock().unwrap() = bind(&self.path);
        self.accept();
    }

    fn wait<T>(&self, found: impl Fn(&Heard) -> Option<T>) -> T {
        let mut state = self.heard.0.lock().unwrap();
        loop {
            if let Some(found) = found(&state) {
                return found;
            }
            let (next, late) = self.heard.1.wait_timeout(state, WAIT).unwrap();
            state = next;
            assert!(!late.timed_out(), "the proxy did not say it");
        }
    }
}

fn bind(path: &Path) -> UnixListener {
    let listener = UnixListener::bind(path).unwrap();
    chown(path, Some(USER), Some(USER)).unwrap();
    listener
}

fn next<T: Message>(read: &mut UnixStream, buffer: &mut Vec<u8>) -> Option<T> {
    loop {
        if let Some((message, length)) = decode(buffer).unwrap() {
            buffer.drain(..length);
            return Some(message);
        }
        let mut part = [0; 65536];
        match read.read(&mut part) {
            Ok(0) | Err(_) => return None,
            Ok(count) => buffer.extend_from_slice(&part[..count]),
        }
    }
}

/// Where the rules of the tests come from.
pub(crate) fn source(place: usize) -> RuleSource {
    RuleSource::Policy {
        policy: PolicyRef {
            kind: PolicyKind::CiliumNetworkPolicy,
            namespace: Some("x".into()),
            name: "rules".into(),
        },
        path: format!("spec.ingress[{place}]"),
    }
}

/// Rules under which a pod, the server, takes what the applications say, from anybody.
pub(crate) fn rules(version: u64, applications: &[Application]) -> Rules {
    rules_of(version, SERVER4, SERVER6, applications)
}

pub(crate) fn rules_of(
    version: u64,
    v4: IpAddr,
    v6: IpAddr,
    applications: &[Application],
) -> Rules {
    let all = (1u128 << applications.len()) - 1;
    let chunk = Chunk { default_peers: all, default_ports: all, redirect: all, ..Chunk::default() };
    let infos = applications.iter().enumerate().map(|(place, application)| RuleInfo {
        action: Action::Allow,
        application: application.clone(),
        ports: NamedPorts { every: true, ..NamedPorts::default() },
        source: source(place),
        also: Vec::new(),
    });
    let table = CompiledPolicy {
        chunks: vec![Arc::new(chunk)],
        rules: infos.collect(),
        hash: version,
        ..CompiledPolicy::default()
    };
    let endpoint = Endpoint { id: 7, identity: 300, ingress: Some(2), egress: None };
    let peer = Peer { identity: 301, prefix: 0, host: false };
    Rules {
        version,
        endpoints: [(v4, endpoint), (v6, endpoint)].into(),
        tables: [(2, Arc::new(table))].into(),
        addresses: [(CLIENT4, peer), (CLIENT6, peer)].into(),
        ..Rules::default()
    }
}

/// `METHOD PATH` as a rule; either may be `*`.
pub(crate) fn http(rules: &[&str]) -> Application {
    let pattern = |text: &str| (text != "*").then(|| Pattern::new(text).unwrap());
    let rule = |text: &&str| {
        let (method, path) = text.split_once(' ').unwrap();
        HttpRule { method: pattern(method), path: pattern(path), ..HttpRule::default() }
    };
    Application::Http(rules.iter().map(rule).collect())
}
