//! What the rules ask of a connection, and what they say to what is asked inside it.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use arc_swap::{ArcSwap, Guard};
use http::{HeaderMap, HeaderName, HeaderValue};
use palisade_api::{
    flow::{Http, L7},
    proxy::{AccessRecord, EndRecord, Peer, Rules, TableId},
};
use palisade_policy::{
    CompiledPolicy, RuleInfo, RuleSource,
    l7::{
        Demand, Editable, HeaderEdit, HttpMatcher, HttpRequest, HttpRule, NamePattern, Secrets,
        Unwritable, edit,
    },
    model,
};
use tokio::net::TcpStream;

use crate::{
    Proxy,
    http::{
        syntax::{Fields, Malformed},
        target::Authority,
    },
    log::{self, Gist},
    net,
    rules::{Changes, Snapshot},
    shares::Share,
};

/// What has to be spoken on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Application {
    /// Nothing passes.
    Denied,
    /// Everything passes.
    Anything,
    /// HTTP.
    Http,
    /// DNS.
    Dns,
    /// TLS.
    Tls,
}

impl Application {
    /// Name of the protocol, where it is one.
    const fn protocol(self) -> Option<&'static str> {
        match self {
            Self::Denied | Self::Anything => None,
            Self::Http => Some("HTTP"),
            Self::Dns => Some("DNS"),
            Self::Tls => Some("TLS"),
        }
    }
}

/// What the rules of one end ask, ready to be asked.
pub enum End {
    /// Nothing passes.
    Deny(Option<Arc<RuleSource>>),
    /// Everything passes.
    Pass(Arc<RuleSource>),
    /// The requests that match.
    Http {
        /// The rules of the whole table.
        rules: Arc<HttpRules>,
        /// Those of them that count here: their numbers, which grow.
        counting: Vec<(Arc<RuleSource>, u32)>,
    },
    /// The questions for these names.
    Dns(Vec<(Arc<RuleSource>, NamePattern)>),
    /// The connections to these server names.
    Tls(Vec<(Arc<RuleSource>, NamePattern)>),
}

impl End {
    /// Without rules that are ready nothing passes.
    fn new(demand: Demand, rules: Option<&Arc<HttpRules>>) -> Self {
        match demand {
            Demand::Deny(source) => Self::Deny(source.map(Arc::new)),
            Demand::Pass(source) => Self::Pass(Arc::new(source)),
            Demand::Dns(names) => Self::Dns(shared(names)),
            Demand::Tls(names) => Self::Tls(shared(names)),
            Demand::Http(counting) => match rules {
                Some(rules) => Self::Http { rules: Arc::clone(rules), counting: shared(counting) },
                None => Self::Deny(None),
            },
        }
    }

    const fn application(&self) -> Application {
        match self {
            Self::Deny(_) => Application::Denied,
            Self::Pass(_) => Application::Anything,
            Self::Http { .. } => Application::Http,
            Self::Dns(_) => Application::Dns,
            Self::Tls(_) => Application::Tls,
        }
    }

    /// What it says to something that only the rules for it may allow.
    fn say(&self, ask: impl FnOnce(&Self) -> Option<Arc<RuleSource>>) -> EndRecord {
        match self {
            Self::Deny(source) => EndRecord { allowed: false, rule: source.clone() },
            Self::Pass(source) => EndRecord { allowed: true, rule: Some(source.clone()) },
            _ => {
                let rule = ask(self);
                EndRecord { allowed: rule.is_some(), rule }
            }
        }
    }

    /// Adds what has to be changed.
    fn http(&self, request: &HttpRequest<'_>, edits: &mut Vec<HeaderEdit>) -> EndRecord {
        self.say(|end| {
            let Self::Http { rules, counting } = end else { return None };
            let source = |rule: usize| {
                let number = rules.numbers.get(rule)?;
                let place = counting.binary_search_by_key(number, |(_, counts)| *counts).ok()?;
                counting.get(place).map(|(source, _)| source)
            };
            let counts = |rule| source(rule).is_some();
            let found = rules.compiled.matcher.judge_by(request, counts)?;
            edits.extend(found.edits);
            source(found.rule).cloned()
        })
    }

    fn name(&self, application: Application, name: &str) -> EndRecord {
        self.say(|end| {
            let (Self::Dns(names) | Self::Tls(names)) = end else { return None };
            let found = names.iter().find(|(_, pattern)| pattern.matches(name));
            found.filter(|_| end.application() == application).map(|(source, _)| source.clone())
        })
    }
}

/// Each record of what is judged names its rule.
fn shared<R>(rules: Vec<(RuleSource, R)>) -> Vec<(Arc<RuleSource>, R)> {
    rules.into_iter().map(|(source, rule)| (Arc::new(source), rule)).collect()
}

/// A question to one table.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Question {
    table: TableId,
    identity: u32,
    prefix: u32,
    protocol: u8,
    port: u16,
}

/// Most answers that are kept.
const MOST_KEPT: usize = 8192;

/// What one version of the rules asks of connections: of those that were asked about, and ready for
/// the others. Patterns are compiled when the rules come; no request waits for that.
#[derive(Default)]
pub(crate) struct Demands {
    http: BTreeMap<TableId, Arc<HttpRules>>,
    asked: Mutex<HashMap<Question, Arc<End>>>,
}

/// The HTTP rules of a table, ready to match.
pub struct HttpRules {
    /// Of each, the number of the table's rule that it belongs to.
    numbers: Vec<u32>,
    compiled: Arc<Compiled>,
}

/// Rules and what was made of them, which tables and versions with the same rules share.
struct Compiled {
    rules: Vec<HttpRule>,
    matcher: HttpMatcher,
}

impl Demands {
    /// Makes rules ready, and keeps what still holds of those before.
    pub(crate) fn new(rules: &Rules, before: &Self, old: &Rules) -> Self {
        let same_secrets = rules.secrets == old.secrets;
        let is_same = |table: &TableId| {
            let hash = |rules: &Rules| rules.tables.get(table).map(|policy| policy.hash);
            same_secrets && hash(rules).is_some() && hash(rules) == hash(old)
        };
        let asked = {
            let asked = before.asked.lock().unwrap_or_else(PoisonError::into_inner);
            let same = asked.iter().filter(|(question, _)| is_same(&question.table));
            same.map(|(question, end)| (*question, Arc::clone(end))).collect()
        };
        let mut http = before.http.clone();
        http.retain(|table, _| is_same(table));
        for (table, policy) in &rules.tables {
            let speaks = |rule: &RuleInfo| matches!(rule.application, model::Application::Http(_));
            if http.contains_key(table) || !policy.rules.iter().any(speaks) {
                continue;
            }
            let (numbers, list): (Vec<_>, Vec<_>) = policy.http_rules().into_iter().unzip();
            let made = http.values().chain(before.http.values().filter(|_| same_secrets));
            let made = made.map(|known| &known.compiled).find(|known| known.rules == list).cloned();
            let make = || Compiled::new(policy, &numbers, list, &rules.secrets);
            let compiled = made.unwrap_or_else(make);
            http.insert(*table, Arc::new(HttpRules { numbers, compiled }));
        }
        Self { http, asked: Mutex::new(asked) }
    }

    fn ask(&self, rules: &Rules, question: Question) -> Arc<End> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(end) = asked.get(&question) {
            return Arc::clone(end);
        }
        let Question { table, identity, prefix, protocol, port } = question;
        let demand = rules
            .tables
            .get(&table)
            .map_or(Demand::Deny(None), |policy| policy.demand(identity, prefix, protocol, port));
        let end = Arc::new(End::new(demand, self.http.get(&table)));
        if asked.len() >= MOST_KEPT {
            asked.clear();
        }
        asked.insert(question, Arc::clone(&end));
        end
    }
}

impl Compiled {
    /// Of rules whose numbers in their table are given.
    fn new(
        table: &CompiledPolicy,
        numbers: &[u32],
        rules: Vec<HttpRule>,
        secrets: &Secrets,
    ) -> Arc<Self> {
        let (matcher, errors) = HttpMatcher::new(&rules, secrets);
        for error in errors {
            let info = numbers.get(error.rule).and_then(|number| table.rule(*number));
            let rule = info.map(|info| info.source.to_string()).unwrap_or_default();
            tracing::error!(%rule, %error, "a rule does not compile and allows nothing");
        }
        Arc::new(Self { rules, matcher })
    }
}

/// The ends of a connection whose policies count here; none: nothing is asked.
struct Ends {
    generation: u64,
    egress: Option<Arc<End>>,
    ingress: Option<Arc<End>>,
    /// One of them is an endpoint of this node.
    known: bool,
    /// One of them has the connection sent here.
    redirected: bool,
}

impl Ends {
    fn find(snapshot: &Snapshot, protocol: u8, client: SocketAddr, server: SocketAddr) -> Self {
        let rules = &snapshot.rules;
        let (from, to) = (rules.endpoints.get(&client.ip()), rules.endpoints.get(&server.ip()));
        let port = server.port();
        let mut redirected = false;
        let mut ask = |table: Option<TableId>, peer: SocketAddr| {
            let table = table?;
            let Peer { identity, prefix, .. } = snapshot.peer(peer.ip());
            let policy = rules.tables.get(&table);
            redirected |=
                policy.is_some_and(|policy| policy.redirects(identity, prefix, protocol, port));
            let question = Question { table, identity, prefix, protocol, port };
            Some(snapshot.demands.ask(rules, question))
        };
        let egress = ask(from.and_then(|endpoint| endpoint.egress), server);
        let ingress = ask(to.and_then(|endpoint| endpoint.ingress), client);
        Self {
            generation: snapshot.generation,
            egress,
            ingress,
            known: from.is_some() || to.is_some(),
            redirected,
        }
    }

    /// What both ends agree on.
    fn application(&self) -> Application {
        if !self.known {
            return Application::Denied;
        }
        let of = |end: &Option<Arc<End>>| {
            end.as_ref().map_or(Application::Anything, |end| end.application())
        };
        match (of(&self.egress), of(&self.ingress)) {
            (Application::Anything, other) | (other, Application::Anything) => other,
            (one, other) if one == other => one,
            _ => Application::Denied,
        }
    }

    /// Why they agree on nothing.
    fn why_denied(&self) -> String {
        let asks = |end: &Option<Arc<End>>| end.as_ref()?.application().protocol();
        match (asks(&self.egress), asks(&self.ingress)) {
            (Some(client), Some(server)) => {
                format!("the client's policy asks for {client}, the server's for {server}")
            }
            _ => "no rule allows it".into(),
        }
    }
}

/// Judges what is said on one connection, always by the newest rules.
pub struct Gate {
    proxy: Arc<Proxy>,
    protocol: u8,
    client: SocketAddr,
    server: SocketAddr,
    ends: ArcSwap<Ends>,
}

/// A request over HTTP.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    /// Version of the protocol.
    pub version: &'static str,
    /// Method.
    pub method: &'a str,
    /// Path and query.
    pub target: &'a str,
    /// Host.
    pub authority: &'a Authority,
    /// When it was complete.
    pub begun: Instant,
}

impl Asked<'_> {
    fn record(&self, judged: &Judged, status: Option<u16>, error: Option<&str>) -> Http {
        let url = ["http://", self.authority.as_str(), self.target].concat();
        Http {
            method: log::told_method(self.method),
            url: log::told(url),
            version: self.version.into(),
            status,
            grpc_status: None,
            latency_ns: u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX),
            mismatches: judged.mismatches(),
            error: error.map(Into::into),
        }
    }
}

impl Editable for Fields {
    fn add(&mut self, name: &str, value: &str) -> Result<(), Unwritable> {
        self.push(name, value.as_bytes());
        Ok(())
    }

    fn remove(&mut self, name: &str, except: Option<&str>) {
        let except = except.map(str::as_bytes);
        self.retain(|other, value| other != name || Some(value) == except);
    }
}

/// The fields of a request over HTTP/2.
pub struct Headers<'a>(pub &'a mut HeaderMap);

impl Editable for Headers<'_> {
    fn add(&mut self, name: &str, value: &str) -> Result<(), Unwritable> {
        let name = HeaderName::try_from(name).map_err(|_| Unwritable)?;
        let value = HeaderValue::try_from(value).map_err(|_| Unwritable)?;
        self.0.try_append(name, value).map(|_| ()).map_err(|_| Unwritable)
    }

    fn remove(&mut self, name: &str, except: Option<&str>) {
        let Ok(name) = HeaderName::try_from(name) else { return };
        let values = self.0.get_all(&name).iter().cloned();
        let kept = values.filter(|value| Some(value.as_bytes()) == except.map(str::as_bytes));
        let kept: Vec<HeaderValue> = kept.collect();
        self.0.remove(&name);
        self.0.extend(kept.into_iter().map(|value| (name.clone(), value)));
    }
}

/// What was said to a request.
#[derive(Clone, Debug)]
pub struct Judged {
    /// Whether all that were asked agree.
    pub allowed: bool,
    egress: Option<EndRecord>,
    ingress: Option<EndRecord>,
    edits: Vec<HeaderEdit>,
    /// Of the rules that said it.
    generation: u64,
}

impl Judged {
    fn new(ends: &Ends, say: impl Fn(&End) -> EndRecord) -> Self {
        let of = |end: &Option<Arc<End>>| end.as_ref().map(|end| say(end));
        Self::of(ends, of(&ends.egress), of(&ends.ingress))
    }

    fn of(ends: &Ends, egress: Option<EndRecord>, ingress: Option<EndRecord>) -> Self {
        let agrees = |end: &Option<EndRecord>| end.as_ref().is_none_or(|end| end.allowed);
        let allowed = ends.known && agrees(&egress) && agrees(&ingress);
        Self { allowed, egress, ingress, edits: Vec::new(), generation: ends.generation }
    }

    /// Something that no rule was asked about.
    #[must_use]
    pub const fn unasked() -> Self {
        Self { allowed: false, egress: None, ingress: None, edits: Vec::new(), generation: 0 }
    }

    /// Whether [`Self::edit`] may change something.
    #[must_use]
    pub const fn edits_fields(&self) -> bool {
        !self.edits.is_empty()
    }

    /// Changes the fields of a request as the rules want it.
    ///
    /// # Errors
    ///
    /// The request must not be sent.
    pub fn edit(&self, fields: &mut impl Editable) -> Result<(), Unwritable> {
        edit(&self.edits, fields)
    }

    /// Refused all the same, for what was said in another way than it may be.
    #[must_use]
    pub fn refused(mut self) -> Self {
        self.allowed = false;
        self
    }

    fn mismatches(&self) -> Vec<String> {
        log::told_names(self.edits.iter().map(|edit| edit.name.as_str()))
    }
}

impl Gate {
    /// For the log: a server does not take the connection.
    pub const UNREACHABLE: &str = "the server cannot be reached";

    /// Looks up what is asked of a connection.
    #[must_use]
    pub fn new(proxy: &Arc<Proxy>, protocol: u8, client: SocketAddr, server: SocketAddr) -> Self {
        let ends = Ends::find(&proxy.rules.load(), protocol, client, server);
        Self {
            proxy: Arc::clone(proxy),
            protocol,
            client,
            server,
            ends: ArcSwap::from_pointee(ends),
        }
    }

    /// What has to be spoken, by the newest rules.
    #[must_use]
    pub fn application(&self) -> Application {
        self.ends().application()
    }

    /// Whether the newest rules send such a connection here. Where they do not, the kernel judges
    /// by others: an end may be a pod that has its address since, with a policy that nobody here
    /// knows.
    #[must_use]
    pub fn is_redirected(&self) -> bool {
        self.ends().redirected
    }

    fn ends(&self) -> Guard<Arc<Ends>> {
        let snapshot = self.proxy.rules.load();
        let ends = self.ends.load();
        if ends.generation == snapshot.generation {
            return ends;
        }
        let ends = Arc::new(Ends::find(&snapshot, self.protocol, self.client, self.server));
        self.ends.store(Arc::clone(&ends));
        Guard::from_inner(ends)
    }

    /// Judges a request with the fields that it came with. The server's end is asked about what
    /// the client's end makes of it, as if each had a proxy of its own, which they may.
    #[must_use]
    pub fn judge(&self, asked: &Asked<'_>, headers: &[(&str, &[u8])]) -> Judged {
        let ends = self.ends();
        let Asked { method, target, authority, .. } = *asked;
        let request = HttpRequest { method, target, host: authority.as_str(), headers };
        let mut edits = Vec::new();
        let egress = ends.egress.as_ref().map(|end| end.http(&request, &mut edits));
        let ingress = ends.ingress.as_ref().map(|end| {
            if edits.is_empty() {
                return end.http(&request, &mut edits);
            }
            let mut sent = Fields::default();
            headers.iter().for_each(|(name, value)| sent.push(name, value));
            if edit(&edits, &mut sent).is_err() {
                return EndRecord { allowed: false, rule: None };
            }
            let headers = &sent.iter().collect::<Vec<_>>();
            end.http(&HttpRequest { headers, ..request }, &mut edits)
        });
        Judged { edits, ..Judged::of(&ends, egress, ingress) }
    }

    /// Judges a name: of a DNS question, or of a TLS server.
    #[must_use]
    pub fn judge_name(&self, application: Application, name: &str) -> Judged {
        Judged::new(&self.ends(), |end| end.name(application, name))
    }

    /// Whether the newest rules allow a request with the fields that it came with.
    #[must_use]
    pub fn allows(&self, asked: &Asked<'_>, fields: &Fields) -> bool {
        self.judge(asked, &fields.iter().collect::<Vec<_>>()).allowed
    }

    /// Returns once a request that was allowed no longer is.
    pub async fn revoked(&self, asked: &Asked<'_>, judged: &Judged, fields: &Fields) {
        self.until(judged.generation, || self.allows(asked, fields)).await;
    }

    /// Tells of changes of the rules from now on.
    #[must_use]
    pub fn changes(&self) -> Changes {
        Changes::new(self.proxy.rules.changes())
    }

    /// Returns once a condition that the rules made true no longer is; it was last asked when
    /// `asked` was their generation.
    pub async fn until(&self, mut asked: u64, mut holds: impl FnMut() -> bool) {
        let mut changes = self.proxy.rules.changes();
        loop {
            let newest = *changes.borrow_and_update();
            if newest != asked && !holds() {
                return;
            }
            asked = newest;
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Whether the newest rules know neither end any more: no policy of this node asks for a proxy,
    /// and none denies what a refusal here would deny.
    #[must_use]
    pub fn is_forgotten(&self) -> bool {
        !self.ends().known
    }

    /// Returns once [`Self::is_forgotten`].
    pub async fn forgotten(&self) {
        // No generation is the 0th.
        self.until(0, || !self.is_forgotten()).await;
    }

    /// The generation of the rules that the connection was last judged by.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.ends.load().generation
    }

    /// Connects to the server. In the client's name, but for a server on this very node, which
    /// would answer the client past the proxy.
    ///
    /// # Errors
    ///
    /// As [`net::connect_as`].
    pub async fn connect(&self) -> io::Result<TcpStream> {
        let own = self.proxy.rules.load().peer(self.server.ip()).host;
        if own {
            return net::connect_own(self.server).await;
        }
        net::connect_as(self.client, self.server).await
    }

    /// One more of the long heads that may be in memory, if the client may have one more.
    pub(crate) fn long_head(&self) -> Option<Share> {
        self.proxy.long_heads.admit(self.client.ip())
    }

    /// What the newest rules say to a connection whose content nobody asked about.
    #[must_use]
    pub fn judge_stream(&self) -> Judged {
        Judged::new(&self.ends(), |end| end.say(|_| None))
    }

    /// Records a request and the status that the client gets.
    pub fn log(
        &self,
        asked: &Asked<'_>,
        judged: &Judged,
        status: Option<u16>,
        error: Option<&str>,
    ) {
        self.record(judged, L7::Http(asked.record(judged, status, error)));
    }

    /// Records a call of gRPC that was denied, and the status that the client gets: an answer of
    /// HTTP, whatever is in it.
    pub fn log_call(&self, asked: &Asked<'_>, judged: &Judged, grpc_status: u16) {
        let http = asked.record(judged, Some(200), None);
        self.record(judged, L7::Http(Http { grpc_status: Some(grpc_status), ..http }));
    }

    /// Records a request that was allowed and ends because it no longer is: the rule that says so,
    /// where there is one.
    pub fn log_cut(&self, asked: &Asked<'_>, fields: &Fields) {
        let judged = self.judge(asked, &fields.iter().collect::<Vec<_>>()).refused();
        self.log(asked, &judged, None, Some(self.why_cut()));
    }

    /// Why nothing may be said, by the newest rules.
    #[must_use]
    pub fn why_denied(&self) -> String {
        self.ends().why_denied()
    }

    /// Why something ends that was allowed.
    #[must_use]
    pub fn why_cut(&self) -> &'static str {
        match self.is_forgotten() {
            true => {
                "cut, because no policy asks for a proxy any more: the next connection is direct"
            }
            false => "cut by a change of policy, which allows it no longer",
        }
    }

    /// Records what was no request, and what can be told of it.
    pub fn log_malformed(&self, version: &'static str, fault: Malformed, gist: Gist) {
        self.record(
            &Judged::unasked(),
            L7::Http(Http {
                method: gist.method.into(),
                url: gist.url,
                version: version.into(),
                status: Some(fault.status),
                grpc_status: None,
                latency_ns: 0,
                mismatches: Vec::new(),
                error: Some(fault.why.into()),
            }),
        );
    }

    /// Records what was judged on this connection.
    pub fn record(&self, judged: &Judged, l7: L7) {
        self.proxy.log.add(AccessRecord {
            time: log::now(),
            protocol: self.protocol,
            client: self.client,
            server: self.server,
            allowed: judged.allowed,
            egress: judged.egress.clone(),
            ingress: judged.ingress.clone(),
            l7,
        });
    }
}
