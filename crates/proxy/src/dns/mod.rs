//! DNS: questions are judged by name, and answers are held until the client may reach what they
//! say.
//!
//! | module | question it answers |
//! |---|---|
//! | `name`, `message` | what do the bytes say? |
//! | `question` | may this be passed on at all? |
//! | `answer` | does it answer the question, and which addresses does it give the name? |
//! | `upstream` | what does the server say? |
//! | `known` | what was the client told before? |
//! | `pace`, `limits` | may the client ask one more? |
//! | `excess` | of whom is it told that it may not? |
//! | `turns` | whose question is next? |
//! | `udp`, `raw`, `tcp` | how do questions come in, and answers go out? |
//!
//! The client's bytes are passed on as they are, but for the id; so are the server's.

mod answer;
mod excess;
mod known;
mod limits;
mod message;
mod name;
mod pace;
mod question;
mod raw;
mod tcp;
#[cfg(test)]
mod tests;
mod turns;
mod udp;
mod upstream;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use palisade_abi::{identity, protocol};
use palisade_api::{
    flow::{self, L7},
    proxy::Rules,
};
use palisade_policy::l7::may_learn;
use tokio::{net::TcpStream, time::timeout};

pub use self::{
    answer::{Answer, MAX_ADDRESSES, Stray},
    name::Name,
    question::{Question, Rcode, Received, Rejected, type_name},
    udp::{Sockets, sockets},
};
use self::{
    excess::Told,
    known::{Knowledge, Known, Pod},
    limits::Limits,
    pace::Pace,
};
use crate::{
    Proxy,
    agent::{Agent, NotLearned},
    judge::{Application, Gate, Judged},
    rules::Snapshot,
    runtime,
};

/// A server that says nothing for so long says nothing at all; neither does the proxy then.
const UPSTREAM: Duration = Duration::from_secs(10);
/// The agent has this long to have addresses in force.
const LEARN: Duration = Duration::from_secs(2);

/// How a question travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// In a connection.
    Tcp,
}

impl Transport {
    /// IP protocol number.
    const fn protocol(self) -> u8 {
        match self {
            Self::Udp => protocol::UDP,
            Self::Tcp => protocol::TCP,
        }
    }
}

/// Who asks whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flow {
    transport: Transport,
    client: SocketAddr,
    server: SocketAddr,
}

/// What the questions of all clients share.
pub struct Dns {
    agent: Agent,
    limits: Arc<Limits>,
    known: Mutex<Known>,
    told: Mutex<Told>,
    /// Of those who ask in connections.
    pace: Mutex<Pace>,
}

impl Dns {
    /// Asks `agent` to have learned addresses in force.
    #[must_use]
    pub fn new(agent: Agent) -> Self {
        Self {
            agent,
            limits: Arc::default(),
            known: Mutex::default(),
            told: Mutex::default(),
            pace: Mutex::default(),
        }
    }

    /// Forgets what pods were told that these rules do not know any more.
    pub(crate) fn forget_gone(&self, rules: &Rules) {
        let number = |pod: Pod| rules.endpoints.get(&pod.address).map(|endpoint| endpoint.id);
        self.known().retain(|pod| number(pod) == Some(pod.endpoint));
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the agent learn, and remembers it.
    async fn learn(&self, learn: &Learn) -> Result<(), NotLearned> {
        let Learn { pod, name, addresses, ttl } = learn;
        let asked = self.agent.learn(pod.address, name.clone(), addresses.clone(), *ttl);
        timeout(LEARN, asked).await.unwrap_or(Err(NotLearned::Refused))?;
        self.known().put(*pod, name, addresses, *ttl, Instant::now());
        Ok(())
    }
}

/// Serves the questions that come in datagrams, in tasks of the main thread. They are received
/// by a thread that does nothing else: one that were busy with the questions of one pod would lose
/// those of others.
///
/// # Errors
/// The system gives no more threads or descriptors.
pub fn serve_udp(proxy: &Arc<Proxy>, sockets: Sockets) -> io::Result<()> {
    let (proxy, raw) = (Arc::clone(proxy), Arc::new(sockets.raw));
    let receiver = runtime()?;
    let receive = move || {
        let [v4, v6] = sockets.asked.map(|asked| udp::serve(&proxy, asked, &raw));
        let ended = receiver.block_on(async { tokio::try_join!(v4, v6) });
        tracing::error!(?ended, "no questions can be received any more");
        // Whoever keeps this process running starts another.
        std::process::exit(1);
    };
    thread::Builder::new().name("questions".into()).spawn(receive)?;
    Ok(())
}

/// Serves the questions of a connection to its end. The address that it was made to is its local
/// one.
pub(crate) async fn serve_tcp(proxy: &Arc<Proxy>, stream: TcpStream, client: SocketAddr) {
    let Ok(server) = stream.local_addr() else { return };
    let flow = Flow { transport: Transport::Tcp, client, server };
    tcp::serve(proxy, stream, flow).await;
}

/// From what a client sent to what it gets, which may be nothing.
async fn exchange(proxy: &Arc<Proxy>, flow: Flow, message: &[u8]) -> Option<Vec<u8>> {
    let begun = Instant::now();
    let gate = Gate::new(proxy, flow.transport.protocol(), flow.client, flow.server);
    let received = Question::read(message);
    if gate.application() == Application::Denied {
        let denied = flow::Dns { error: Some(gate.why_denied()), ..asked(&received, begun) };
        gate.record(&gate.judge_stream().refused(), L7::Dns(denied));
        return None;
    }
    match received {
        Received::Noise => None,
        Received::Rejected(ref rejected) => {
            let rcode = Some(rejected.rcode.to_string());
            let refused = flow::Dns { rcode, ..asked(&received, begun) };
            gate.record(&Judged::unasked(), L7::Dns(refused));
            Some(rejected.reply.clone())
        }
        Received::Question(question) => {
            let name = question.name.text();
            Exchange { proxy, flow, gate, question, name, begun }.run(message).await
        }
    }
}

/// Records a question that is dropped unjudged, unless another one of the client was just now.
fn record_excess(proxy: &Arc<Proxy>, flow: Flow, message: &[u8], why: &str) {
    let begun = Instant::now();
    let is_due = {
        let mut told = proxy.dns.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.is_due(flow.client.ip(), begun)
    };
    if !is_due {
        return;
    }
    let asked = asked(&Question::read(message), begun);
    let gate = Gate::new(proxy, flow.transport.protocol(), flow.client, flow.server);
    gate.record(&Judged::unasked(), L7::Dns(flow::Dns { error: Some(why.into()), ..asked }));
}

/// What a client is about to hear, of a name that opens addresses.
struct Learn {
    pod: Pod,
    name: String,
    addresses: Vec<IpAddr>,
    ttl: u32,
}

/// A question on its way.
struct Exchange<'a> {
    proxy: &'a Arc<Proxy>,
    flow: Flow,
    gate: Gate,
    question: Question,
    /// The question's name as rules speak of it.
    name: String,
    begun: Instant,
}

impl Exchange<'_> {
    async fn run(&self, message: &[u8]) -> Option<Vec<u8>> {
        let judged = self.judge();
        if !judged.allowed {
            return Some(self.reply(&judged, Rcode::REFUSED));
        }
        let asked = tokio::select! {
            // First of all: a question that may no longer be asked does not go on.
            biased;
            () = self.gate.until(self.gate.generation(), || self.judge().allowed) => {
                return Some(self.reply(&self.judge().refused(), Rcode::REFUSED));
            }
            asked = timeout(UPSTREAM, self.ask(message)) => asked,
        };
        let (answer, reply) = match asked {
            Ok(Ok(answered)) => answered,
            Ok(Err(error)) => {
                tracing::debug!(%error, server = %self.flow.server, "the server cannot be asked");
                return Some(self.fail(&judged, "the server cannot be asked"));
            }
            Err(_) => {
                self.record(&judged, None, None);
                return None;
            }
        };
        // The rules may be others than when the question came, before the agent learns anything by
        // them, and after it did.
        let judged = self.judge();
        if !judged.allowed {
            return Some(self.reply(&judged, Rcode::REFUSED));
        }
        if let Err(why) = self.may_hear(&answer).await {
            return Some(self.fail(&judged, why));
        }
        let judged = self.judge();
        if !judged.allowed {
            return Some(self.reply(&judged, Rcode::REFUSED));
        }
        self.record(&judged, Some(answer.rcode), Some(&answer));
        Some(reply)
    }

    fn judge(&self) -> Judged {
        self.gate.judge_name(Application::Dns, &self.name)
    }

    /// Asks the server: in the client's name, but for a server on this very node, which would
    /// answer the client past the proxy.
    async fn ask(&self, message: &[u8]) -> io::Result<(Answer, Vec<u8>)> {
        let Flow { transport, client, server } = self.flow;
        let own = self.proxy.rules.load().peer(server.ip()).host;
        let name = (!own).then_some(client.ip());
        upstream::ask(transport, name, server, &self.question, message).await
    }

    /// Whether the client may hear the answer, or why not: it can reach what the answer says, as
    /// far as the rules for the name let it.
    async fn may_hear(&self, answer: &Answer) -> Result<(), &'static str> {
        const HELD_BACK: &str = "what the answer says could not be put in force";
        let Some(pod) = self.learner() else { return Ok(()) };
        if answer.excess {
            return Err("the answer says more addresses than a name has room for");
        }
        let Some(learn) = self.to_learn(pod, answer) else { return Ok(()) };
        let Learn { pod, name, addresses, ttl } = &learn;
        let knowledge = self.proxy.dns.known().of(*pod, name, addresses, *ttl, Instant::now());
        match knowledge {
            Knowledge::Whole => Ok(()),
            Knowledge::Shorter => {
                let proxy = Arc::clone(self.proxy);
                // What fails now is asked again when it expired.
                tokio::spawn(async move { _ = proxy.dns.learn(&learn).await });
                Ok(())
            }
            Knowledge::Expired | Knowledge::New => match self.proxy.dns.learn(&learn).await {
                Ok(()) => Ok(()),
                // An agent that is away takes nothing back.
                Err(NotLearned::Away) if knowledge == Knowledge::Expired => Ok(()),
                Err(_) => Err(HELD_BACK),
            },
        }
    }

    /// The client, where the name opens addresses to it.
    fn learner(&self) -> Option<Pod> {
        let snapshot = self.proxy.rules.load();
        let address = self.flow.client.ip();
        let endpoint = snapshot.rules.endpoints.get(&address)?;
        let table = snapshot.rules.tables.get(&endpoint.egress?)?;
        let opens = table.fqdns.iter().any(|pattern| pattern.matches(&self.name));
        opens.then_some(Pod { address, endpoint: endpoint.id })
    }

    /// What has to be in force before the client hears the answer.
    fn to_learn(&self, pod: Pod, answer: &Answer) -> Option<Learn> {
        let snapshot = self.proxy.rules.load();
        let addresses = answer.addresses.iter().copied();
        let addresses: Vec<_> =
            addresses.filter(|address| is_outside(&snapshot, *address)).collect();
        let (name, ttl) = (self.name.clone(), answer.ttl);
        (!addresses.is_empty()).then_some(Learn { pod, name, addresses, ttl })
    }

    /// An answer that is only a code, and recorded.
    fn reply(&self, judged: &Judged, rcode: Rcode) -> Vec<u8> {
        self.record(judged, Some(rcode), None);
        self.question.reply(rcode)
    }

    /// The same, for something that is neither the rules' nor the server's doing.
    fn fail(&self, judged: &Judged, why: &str) -> Vec<u8> {
        let rcode = Rcode::SERVER_FAILURE;
        let (code, error) = (Some(rcode.to_string()), Some(why.to_owned()));
        self.gate.record(judged, L7::Dns(flow::Dns { rcode: code, error, ..self.unanswered() }));
        self.question.reply(rcode)
    }

    fn record(&self, judged: &Judged, rcode: Option<Rcode>, answer: Option<&Answer>) {
        let told = answer.filter(|answer| !answer.addresses.is_empty());
        let record = flow::Dns {
            rcode: rcode.map(|rcode| rcode.to_string()),
            addresses: told.map_or_else(Vec::new, |answer| answer.addresses.clone()),
            ttl: told.map(|answer| answer.ttl),
            ..self.unanswered()
        };
        self.gate.record(judged, L7::Dns(record));
    }

    fn unanswered(&self) -> flow::Dns {
        unanswered(self.name.clone(), type_name(self.question.kind), self.begun)
    }
}

/// Whether a name may open an address: nothing in the cluster has its identity by a name.
fn is_outside(snapshot: &Snapshot, address: IpAddr) -> bool {
    may_learn(address)
        && !snapshot.rules.addresses.contains_key(&address)
        && identity::is_world(snapshot.peer(address).identity)
}

/// As much as can be told of what a client sent.
fn asked(received: &Received, begun: Instant) -> flow::Dns {
    let (name, kind) = match received {
        Received::Question(question) => (&question.name, question.kind),
        Received::Rejected(Rejected { question: Some((name, kind)), .. }) => (name, *kind),
        _ => return unanswered(String::new(), String::new(), begun),
    };
    unanswered(name.text(), type_name(kind), begun)
}

/// A question without an answer.
fn unanswered(query: String, qtype: String, begun: Instant) -> flow::Dns {
    flow::Dns {
        query,
        qtype,
        rcode: None,
        addresses: Vec::new(),
        ttl: None,
        latency_ns: u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX),
        error: None,
    }
}
