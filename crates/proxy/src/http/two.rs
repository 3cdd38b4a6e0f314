//! A connection over HTTP/2: many requests at a time, each judged, each on a stream of its own to
//! the server, over one connection that belongs to that of the client.
//!
//! The `h2` crate reads and writes the frames and refuses what RFC 9113 calls malformed; what it
//! calls by another name, or drops, is seen before ([`frames`]), and what it leaves
//! open is settled in [`Asking::read`]. A target is judged and forwarded in the same canonical form
//! as over HTTP/1.

use std::{
    future::poll_fn,
    io,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, future::OptionFuture, stream::FuturesUnordered};
use h2::{
    Reason, RecvStream, SendStream, StreamId,
    client::{self, ResponseFuture, SendRequest},
    server::{self, SendResponse},
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use palisade_policy::l7::Unwritable;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::{Notify, OnceCell},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout, timeout_at},
};

use super::{
    HEAD_TIME, IDLE_TIME, LATE, MANY_INTERIM, MOST_INTERIM, SHORT_HEAD, UNHEARD,
    activity::Activity,
    frames::{self, Reader},
    may_trail,
    reply::{DENIED, Reply, SERVER, date},
    request::{is_own, read_length},
    room_for,
    syntax::{Fields, MOST_FIELDS, MOST_HEAD, Malformed, is_token, trim},
    target::{Authority, Target},
};
use crate::{
    buffer::Buffer,
    judge::{Asked, Gate, Headers, Judged},
    log::Gist,
    net::CONNECT_TIME,
    shares::Share,
};

const VERSION: &str = "HTTP/2";
/// Streams at a time.
const MOST_STREAMS: u32 = 100;
/// Of one stream's body that is under way, each way.
const WINDOW: u32 = 64 << 10;
/// Of all streams' bodies from one side.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Streams that a client may take back at once.
const MOST_RESETS: f64 = 200.0;
/// And each second from then on.
const RESETS_A_SECOND: f64 = 20.0;
/// For a client to see that the connection ends, once nothing is under way any more.
const END_TIME: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });
/// Answers with an error that a client can provoke in the protocol itself.
const MOST_ERRORS: usize = 100;

/// Serves the connection to its end, if it has begun at the deadline.
pub(super) async fn serve(gate: &Gate, client: TcpStream, buffer: Buffer, deadline: Instant) {
    let told = Arc::<Told>::default();
    let handshake = server::Builder::new()
        .max_concurrent_streams(MOST_STREAMS)
        .max_header_list_size(MOST_HEAD as u32)
        .initial_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(WINDOW as usize)
        .max_local_error_reset_streams(Some(MOST_ERRORS))
        .handshake(Client {
            gate,
            buffer,
            stream: client,
            reader: Reader::default(),
            long_head: None,
            fault: None,
            told: Arc::clone(&told),
        });
    if let Ok(Ok(connection)) = timeout_at(deadline, handshake).await {
        let shared = Shared { gate, server: OnceCell::new(), gone: Arc::default(), told };
        shared.serve(connection).await;
    }
}

type Connection<'g> = server::Connection<Client<'g>, Bytes>;

/// What the streams of a connection share.
struct Shared<'g> {
    gate: &'g Gate,
    server: OnceCell<Server>,
    /// Told when the connection to the server ends.
    gone: Arc<Notify>,
    told: Arc<Told>,
}

/// What was seen in the client's frames, and the crate does not tell.
#[derive(Default)]
struct Told {
    seen: Mutex<Seen>,
    /// A long head is under way.
    long: Notify,
}

#[derive(Default)]
struct Seen {
    /// Why the connection ends.
    fault: Option<Reason>,
    long: bool,
    /// Streams, until it is said to them.
    malformed: Vec<u32>,
}

impl Told {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is what the crate drops in what a stream said since it was asked last.
    fn is_malformed(&self, stream: StreamId) -> bool {
        let malformed = &mut self.seen().malformed;
        let at = malformed.iter().position(|other| stream.as_u32() == *other);
        at.map(|at| malformed.swap_remove(at)).is_some()
    }
}

/// How long a connection without streams is kept.
fn patience(ending: bool) -> Duration {
    if ending { END_TIME } else { IDLE_TIME }
}

/// How a stream ended.
#[derive(PartialEq, Eq)]
enum Ended {
    Well,
    /// The client took it back, or made the proxy do so.
    TakenBack,
}

impl Shared<'_> {
    async fn serve(&self, mut connection: Connection<'_>) {
        let mut streams = FuturesUnordered::new();
        let mut resets = Allowance::new();
        let mut idle = pin!(sleep_until(Instant::now() + IDLE_TIME));
        let mut late = pin!(sleep_until(Instant::now() + HEAD_TIME));
        let (mut forgotten, mut ending) = (pin!(self.gate.forgotten()), false);
        loop {
            let end = tokio::select! {
                // The connection after the streams: what they all have to say goes out together.
                biased;
                () = &mut forgotten, if !ending => true,
                () = self.gone.notified(), if !ending => true,
                Some(ended) = streams.next() => {
                    if ended == Ended::TakenBack && !resets.take() {
                        connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                    }
                    if streams.is_empty() {
                        idle.as_mut().reset(Instant::now() + patience(ending));
                    }
                    false
                }
                accepted = connection.accept() => match accepted {
                    Some(Ok((request, respond))) => {
                        match self.begin(request, respond) {
                            // Not of an `async fn`: it would keep what it is given twice.
                            Some(mut stream) => streams.push(async move { stream.run().await }),
                            None => idle.as_mut().reset(Instant::now() + patience(ending)),
                        }
                        false
                    }
                    Some(Err(_)) => {
                        let Some(reason) = self.told.seen().fault.take() else { return };
                        connection.abrupt_shutdown(reason);
                        true
                    }
                    None => return,
                },
                () = self.told.long.notified() => {
                    late.as_mut().reset(Instant::now() + HEAD_TIME);
                    false
                }
                () = &mut late, if self.told.seen().long && !ending => {
                    self.gate.log_malformed(VERSION, LATE, Gist::default());
                    // Nothing else can be said on the connection, be it of streams under way.
                    connection.abrupt_shutdown(Reason::NO_ERROR);
                    true
                }
                () = &mut idle, if streams.is_empty() => match ending {
                    false => true,
                    // A client that does not see it is not waited for.
                    true => return,
                },
            };
            if end {
                ending = true;
                connection.graceful_shutdown();
                idle.as_mut().reset(Instant::now() + END_TIME);
            }
        }
    }

    /// Has one request answered: at once, or by the server.
    fn begin(
        &self,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
    ) -> Option<Stream<'_>> {
        let (parts, body) = request.into_parts();
        match self.admit(&parts, respond.stream_id()) {
            Ok(admitted) => {
                let body = (!body.is_end_stream()).then_some(body);
                let method = parts.method;
                Some(Stream { shared: self, admitted, method, body, respond, told: false })
            }
            Err(refusal) => {
                refusal.say(&mut respond, parts.method == Method::HEAD);
                None
            }
        }
    }

    /// Judges a request, and tells of it if it goes no further.
    fn admit(&self, parts: &http::request::Parts, stream: StreamId) -> Result<Admitted, Refusal> {
        let malformed = |fault: Malformed| {
            self.gate.log_malformed(VERSION, fault, gist(parts));
            Refusal::Reply(Reply::malformed(fault))
        };
        let asking = self.read(parts, stream).map_err(|fault| match fault {
            Fault::Malformed(fault) => malformed(fault),
            Fault::Protocol(why) => {
                self.gate.log_malformed(VERSION, Malformed::bad(why), gist(parts));
                Refusal::Reset(Reason::PROTOCOL_ERROR)
            }
        })?;
        let room = room_for(self.gate, length(parts)).map_err(malformed)?;
        let begun = std::time::Instant::now();
        let asked = asking.asked(&parts.method, begun);
        let judged = self.gate.judge(&asked, &asking.fields.iter().collect::<Vec<_>>());
        if self.gate.is_forgotten() {
            self.gate.log_cut(&asked, &asking.fields);
            return Err(Refusal::Reset(Reason::REFUSED_STREAM));
        }
        if !judged.allowed && is_grpc(parts) {
            self.gate.log_call(&asked, &judged, PERMISSION_DENIED);
            return Err(Refusal::Call);
        }
        if !judged.allowed {
            self.gate.log(&asked, &judged, Some(403), None);
            return Err(Refusal::Reply(Reply::DENIED));
        }
        let mut forward = asking.request(parts).map_err(|_| malformed(Malformed::bad("no URL")))?;
        if judged.edit(&mut Headers(forward.headers_mut())).is_err() {
            self.gate.log(&asked, &judged.refused(), Some(403), Some(Unwritable::WHY));
            return Err(Refusal::Reply(Reply::DENIED));
        }
        Ok(Admitted { asking, begun, judged, forward, _room: room })
    }

    fn read(&self, parts: &http::request::Parts, stream: StreamId) -> Result<Asking, Fault> {
        match self.told.is_malformed(stream) {
            true => Err(Fault::Protocol("fields that the message must not have")),
            false => Asking::read(parts),
        }
    }

    /// The connection to the server, made for the first request that is allowed.
    async fn server(&self) -> io::Result<SendRequest<Bytes>> {
        if let Some(server) = self.server.get() {
            return Ok(server.send.clone());
        }
        // In memory of its own, which all later requests do without.
        let server = self.server.get_or_try_init(|| {
            Box::pin(async {
                let stream = self.gate.connect().await?;
                Server::handshake(stream, Arc::clone(&self.gone)).await.map_err(io::Error::other)
            })
        });
        // One who waits for a connection that fails begins anew, after those who waited before.
        Ok(timeout(CONNECT_TIME, server).await??.send.clone())
    }
}

/// The connection to the server.
struct Server {
    send: SendRequest<Bytes>,
    driver: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Server {
    async fn handshake(stream: TcpStream, gone: Arc<Notify>) -> Result<Self, h2::Error> {
        let (send, connection) = client::Builder::new()
            .enable_push(false)
            .max_header_list_size(MOST_HEAD as u32)
            .initial_window_size(WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buffer_size(WINDOW as usize)
            .handshake(stream)
            .await?;
        let driver = tokio::spawn(async move {
            _ = connection.await;
            gone.notify_one();
        });
        Ok(Self { send, driver })
    }
}

/// Why a request is not judged.
pub enum Fault {
    /// It gets an answer.
    Malformed(Malformed),
    /// It is against the protocol: the stream is reset.
    Protocol(&'static str),
}

impl From<Malformed> for Fault {
    fn from(fault: Malformed) -> Self {
        Self::Malformed(fault)
    }
}

/// What is asked, in canonical form.
pub struct Asking {
    /// Path and query.
    pub target: Target,
    /// Host.
    pub authority: Authority,
    fields: Fields,
}

impl Asking {
    /// Settles what the protocol leaves open.
    ///
    /// # Errors
    ///
    /// It is not certain what the request is.
    pub fn read(parts: &http::request::Parts) -> Result<Self, Fault> {
        if parts.method == Method::CONNECT {
            let why = "CONNECT is not for this proxy";
            return Err(Malformed { status: 405, why }.into());
        }
        if parts.uri.scheme_str() != Some("http") {
            return Err(Fault::Protocol("the scheme is not http"));
        }
        if !parts.headers.iter().all(|(name, value)| is_field(name.as_str(), value.as_bytes())) {
            return Err(Fault::Protocol("a header field that is none"));
        }
        let authority = read_authority(parts)?;
        // The crate takes an empty one for 0.
        let mut lengths = parts.headers.get_all(header::CONTENT_LENGTH).iter();
        let is_bad = |length: &HeaderValue| read_length(length.as_bytes()).is_err();
        if lengths.next().is_some_and(is_bad) || lengths.next().is_some() {
            return Err(Fault::Protocol("a content length that is no number, or two of them"));
        }
        if parts.headers.len() > MOST_FIELDS {
            return Err(Malformed { status: 431, why: "too many header fields" }.into());
        }
        let target = match parts.uri.path_and_query().map_or("", |target| target.as_str()) {
            "*" if parts.method == Method::OPTIONS => Target::asterisk(),
            target => Target::read(target.as_bytes())?,
        };
        let mut fields = Fields::default();
        for (name, value) in parts.headers.iter().filter(|(name, _)| passes(name.as_str())) {
            fields.push(name.as_str(), value.as_bytes());
        }
        Ok(Self { target, authority, fields })
    }

    fn asked<'a>(&'a self, method: &'a Method, begun: std::time::Instant) -> Asked<'a> {
        Asked {
            version: VERSION,
            method: method.as_str(),
            target: self.target.as_str(),
            authority: &self.authority,
            begun,
        }
    }

    /// The request for the server: what is judged, and nothing else.
    ///
    /// # Errors
    ///
    /// It makes no URL.
    pub fn request(&self, parts: &http::request::Parts) -> Result<Request<()>, http::Error> {
        let uri = Uri::builder()
            .scheme("http")
            .authority(self.authority.as_str())
            .path_and_query(self.target.as_str())
            .build()?;
        let mut request = Request::new(());
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = uri;
        let passing = parts.headers.iter().filter(|(name, _)| passes(name.as_str()));
        let passing = passing.map(|(name, value)| (name.clone(), value.clone()));
        request.headers_mut().extend(passing);
        Ok(request)
    }
}

/// What the crate lets through although RFC 9113 section 8.2.1 calls it malformed: names that are
/// no tokens, and space around a value, which servers take away and the judge would not.
fn is_field(name: &str, value: &[u8]) -> bool {
    name.bytes().all(is_token) && trim(value).len() == value.len()
}

/// Whether a field is forwarded: those that frame the message or belong to one hop are the
/// protocol's own here, and it refuses the others.
fn passes(name: &str) -> bool {
    matches!(name, "te" | "content-length" | "expect") || !is_own(name)
}

/// There is one host: where it is said twice, it is the same.
fn read_authority(parts: &http::request::Parts) -> Result<Authority, Fault> {
    let mut all = parts
        .uri
        .authority()
        .map(|authority| authority.as_str().as_bytes())
        .into_iter()
        .chain(parts.headers.get_all(header::HOST).iter().map(HeaderValue::as_bytes));
    let first = all.next().ok_or(Fault::Protocol("there is no host"))?;
    let authority = Authority::read(first).map_err(|fault| Fault::Protocol(fault.why))?;
    for other in all {
        if Authority::read(other).ok().as_ref() != Some(&authority) {
            return Err(Fault::Protocol("two hosts"));
        }
    }
    Ok(authority)
}

/// What a request takes in memory.
fn length(parts: &http::request::Parts) -> usize {
    let target = parts.uri.path_and_query().map_or(0, |target| target.as_str().len());
    let fields = parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len());
    target + fields.sum::<usize>()
}

/// What is told of a request that is refused.
fn gist(parts: &http::request::Parts) -> Gist {
    let authority = parts.uri.authority().map(|authority| authority.as_str().as_bytes());
    let host = authority.or_else(|| parts.headers.get(header::HOST).map(HeaderValue::as_bytes));
    let target = parts.uri.path_and_query().map_or("", |target| target.as_str());
    Gist::new(parts.method.as_str().as_bytes(), target.as_bytes(), host.unwrap_or_default())
}

/// Answers in the server's place.
fn answer(respond: &mut SendResponse<Bytes>, reply: Reply, head_only: bool) {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(reply.status).unwrap_or_default();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(reply.body.len()));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    sign(headers);
    if let Ok(mut body) = respond.send_response(response, head_only)
        && !head_only
    {
        _ = body.send_data(Bytes::from_static(reply.body.as_bytes()), true);
    }
}

/// Answers a call of gRPC that policy denies.
fn deny_call(respond: &mut SendResponse<Bytes>) {
    let mut response = Response::new(());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from(PERMISSION_DENIED));
    let message = DENIED.replace("\r\n", "%0D%0A");
    if let Ok(message) = HeaderValue::try_from(message) {
        headers.insert("grpc-message", message);
    }
    sign(headers);
    _ = respond.send_response(response, true);
}

/// By the type of the content, which may have a suffix or a parameter; gRPC-Web is another protocol.
fn is_grpc(parts: &http::request::Parts) -> bool {
    let kind = parts.headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let rest = kind.strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| matches!(rest, [] | [b'+' | b';' | b' ', ..]))
}

const PERMISSION_DENIED: u16 = 7;

fn sign(headers: &mut HeaderMap) {
    if let Ok(date) = HeaderValue::try_from(date()) {
        headers.insert(header::DATE, date);
    }
    headers.insert(header::SERVER, HeaderValue::from_static(SERVER));
}

/// Why an exchange ended early.
enum Break {
    /// The client is gone.
    Client,
    /// The client's stream is reset.
    Reset(Reason),
    /// So it is, and by the client's own doing.
    Malformed,
    /// The client gets an answer.
    Reply(Reply, &'static str),
}

/// What a request gets that goes no further.
enum Refusal {
    Reply(Reply),
    /// It is a call of gRPC: a status that its client understands.
    Call,
    Reset(Reason),
}

impl Refusal {
    fn say(self, respond: &mut SendResponse<Bytes>, head_only: bool) {
        match self {
            Self::Reply(reply) => answer(respond, reply, head_only),
            Self::Call => deny_call(respond),
            Self::Reset(reason) => respond.send_reset(reason),
        }
    }
}

/// A request that was allowed.
struct Admitted {
    asking: Asking,
    begun: std::time::Instant,
    judged: Judged,
    /// What the server gets.
    forward: Request<()>,
    _room: Option<Share>,
}

/// One request under way.
struct Stream<'g> {
    shared: &'g Shared<'g>,
    admitted: Admitted,
    method: Method,
    /// None: the request has none.
    body: Option<RecvStream>,
    respond: SendResponse<Bytes>,
    /// A record says how it was answered, or why not.
    told: bool,
}

impl Drop for Stream<'_> {
    /// Whatever it was that ended it, be it the end of the connection: the server may have it.
    fn drop(&mut self) {
        if !self.told {
            let Admitted { asking, begun, judged, .. } = &self.admitted;
            let asked = asking.asked(&self.method, *begun);
            self.shared.gate.log(&asked, judged, None, Some(UNHEARD));
        }
    }
}

impl Stream<'_> {
    /// Sees it answered.
    async fn run(&mut self) -> Ended {
        let Self { shared, admitted, method, body, respond, told } = self;
        let Admitted { asking, begun, judged, forward, .. } = admitted;
        let gate = shared.gate;
        let asked = asking.asked(method, *begun);
        let exchange = Exchange { shared, asked: &asked, judged };
        let mut up = None;
        tokio::select! {
            // First of all: what is no longer allowed does not go on.
            biased;
            () = gate.revoked(&asked, judged, &asking.fields) => {
                gate.log_cut(&asked, &asking.fields);
                *told = true;
                // Dropping it would still send what waits to be sent.
                if let Some(mut up) = up {
                    up.send_reset(Reason::CANCEL);
                }
                respond.send_reset(Reason::CANCEL);
                Ended::Well
            }
            outcome = exchange.run(forward, body, respond, &mut up, told) => match outcome {
                Ok(()) => Ended::Well,
                Err(Break::Client) => Ended::TakenBack,
                Err(Break::Reset(reason)) => {
                    respond.send_reset(reason);
                    Ended::Well
                }
                Err(Break::Malformed) => {
                    if !std::mem::replace(told, true) {
                        gate.log(&asked, judged, None, Some("the request's body is malformed"));
                    }
                    respond.send_reset(Reason::PROTOCOL_ERROR);
                    Ended::TakenBack
                }
                Err(Break::Reply(reply, why)) => {
                    gate.log(&asked, judged, Some(reply.status), Some(why));
                    *told = true;
                    answer(respond, reply, *method == Method::HEAD);
                    Ended::Well
                }
            },
        }
    }
}

/// How a request gets its answer from the server.
struct Exchange<'a> {
    shared: &'a Shared<'a>,
    asked: &'a Asked<'a>,
    judged: &'a Judged,
}

impl Exchange<'_> {
    async fn run(
        &self,
        request: &mut Request<()>,
        body: &mut Option<RecvStream>,
        respond: &mut SendResponse<Bytes>,
        up: &mut Option<SendStream<Bytes>>,
        told: &mut bool,
    ) -> Result<(), Break> {
        let mut send = tokio::select! {
            biased;
            // Else clients could have any number of requests wait that they count as taken back.
            _ = poll_fn(|cx| respond.poll_reset(cx)) => return Err(Break::Client),
            send = self.ready() => send?,
        };
        let (mut response, sent) = send
            .send_request(std::mem::take(request), body.is_none())
            .map_err(|_| Break::Reply(Reply::NO_SERVER, GONE))?;
        let up = up.insert(sent);
        let activity = Activity::new();
        let stream = respond.stream_id();
        // Trailers of requests do not pass.
        let own_trailers = |_| match self.shared.told.is_malformed(stream) {
            true => Err(Stop::Malformed),
            false => Ok(HeaderMap::new()),
        };
        // In memory of its own, which most requests, having no body, do without.
        let mut upload = OptionFuture::from(body.take().map(|body| {
            Box::pin(async {
                match pump(body, up, own_trailers, &activity).await {
                    Ok(()) | Err(Stop::Writer) => Ok(()),
                    Err(Stop::Reader(_)) => Err(Break::Client),
                    Err(Stop::Malformed) => Err(Break::Malformed),
                }
            })
        }));
        let (mut uploading, mut interims) = (true, 0);
        let head = loop {
            tokio::select! {
                biased;
                sent = &mut upload, if uploading => {
                    sent.transpose()?;
                    uploading = false;
                }
                _ = poll_fn(|cx| respond.poll_reset(cx)) => return Err(Break::Client),
                heard = hear(&mut response) => match heard {
                    // A client takes them without a window: what it does not read is kept here.
                    Heard::Interim(_) if interims == MOST_INTERIM => {
                        return Err(Break::Reply(Reply::NO_ANSWER, MANY_INTERIM.why));
                    }
                    Heard::Interim(interim) => {
                        interims += 1;
                        activity.note();
                        _ = respond.send_informational(interim);
                    }
                    Heard::Answer(answer) => break answer,
                },
                () = activity.stopped(), if !uploading => {
                    return Err(Break::Reply(Reply::LATE, "the server did not answer in time"));
                }
            }
        };
        // What is moved on from here on takes no room while the body is.
        let (mut down, answer) = {
            let head = head.map_err(|error| match error.is_go_away() || error.is_io() {
                true => Break::Reply(Reply::NO_SERVER, GONE),
                false => Break::Reply(
                    Reply::NO_ANSWER,
                    "the server's answer is malformed or was taken back",
                ),
            })?;
            self.shared.gate.log(self.asked, self.judged, Some(head.status().as_u16()), None);
            *told = true;
            let (parts, answer) = head.into_parts();
            let end = answer.is_end_stream();
            let sent = respond.send_response(Response::from_parts(parts, ()), end);
            let down = sent.map_err(|_| Break::Client)?;
            if end {
                return Ok(());
            }
            (down, answer)
        };
        activity.note();
        let mut download = pin!(pump(answer, &mut down, passing_trailers, &activity));
        loop {
            tokio::select! {
                biased;
                sent = &mut upload, if uploading => {
                    sent.transpose()?;
                    uploading = false;
                }
                sent = &mut download => return sent.map_err(|stop| match stop {
                    Stop::Writer => Break::Client,
                    Stop::Reader(reason) => Break::Reset(reason),
                    Stop::Malformed => Break::Malformed,
                }),
            }
        }
    }

    /// The connection to the server, once it takes a request.
    async fn ready(&self) -> Result<SendRequest<Bytes>, Break> {
        let unreachable = |_| Break::Reply(Reply::NO_SERVER, Gate::UNREACHABLE);
        let send = self.shared.server().await.map_err(unreachable)?;
        send.ready().await.map_err(|_| Break::Reply(Reply::NO_SERVER, GONE))
    }
}

/// What a server says.
enum Heard {
    Interim(Response<()>),
    Answer(Result<Response<RecvStream>, h2::Error>),
}

async fn hear(response: &mut ResponseFuture) -> Heard {
    poll_fn(|cx| match response.poll_informational(cx) {
        Poll::Ready(Some(Ok(interim))) => Poll::Ready(Heard::Interim(interim)),
        _ => Pin::new(&mut *response).poll(cx).map(Heard::Answer),
    })
    .await
}

const GONE: &str = "the server went away before it answered";

/// Which side of a pump broke.
enum Stop {
    Reader(Reason),
    Writer,
    /// What was read looked whole, and is not what it should be.
    Malformed,
}

/// Trailers of answers without those that may not pass.
fn passing_trailers(trailers: HeaderMap) -> Result<HeaderMap, Stop> {
    let passing = trailers.iter().filter(|(name, _)| may_trail(name.as_str()));
    Ok(passing.map(|(name, value)| (name.clone(), value.clone())).collect())
}

/// Moves a body, and those of its trailers that pass.
async fn pump(
    mut from: RecvStream,
    to: &mut SendStream<Bytes>,
    pass: impl FnOnce(HeaderMap) -> Result<HeaderMap, Stop>,
    activity: &Activity,
) -> Result<(), Stop> {
    loop {
        let data = tokio::select! {
            biased;
            data = from.data() => data,
            _ = poll_fn(|cx| to.poll_reset(cx)) => return Err(Stop::Writer),
            () = activity.stopped() => return Err(Stop::Reader(Reason::CANCEL)),
        };
        activity.note();
        let Some(data) = data else { break };
        let data = data.map_err(|error| Stop::Reader(error.reason().unwrap_or(Reason::CANCEL)))?;
        let (length, end) = (data.len(), from.is_end_stream());
        send(to, data, end, activity).await?;
        _ = from.flow_control().release_capacity(length);
        if end {
            return Ok(());
        }
    }
    let trailers = from.trailers().await;
    let trailers =
        trailers.map_err(|error| Stop::Reader(error.reason().unwrap_or(Reason::CANCEL)))?;
    let trailers = pass(trailers.unwrap_or_default())?;
    match trailers.is_empty() {
        true => to.send_data(Bytes::new(), true),
        false => to.send_trailers(trailers),
    }
    .map_err(|_| Stop::Writer)
}

/// Sends as the other side makes room; one that makes none for long is gone.
async fn send(
    to: &mut SendStream<Bytes>,
    mut data: Bytes,
    end: bool,
    activity: &Activity,
) -> Result<(), Stop> {
    if data.is_empty() && end {
        return to.send_data(data, true).map_err(|_| Stop::Writer);
    }
    while !data.is_empty() {
        to.reserve_capacity(data.len());
        let room = activity.within(poll_fn(|cx| to.poll_capacity(cx))).await;
        let Some(Some(Ok(room))) = room else { return Err(Stop::Writer) };
        let part = data.split_to(room.min(data.len()));
        to.send_data(part, end && data.is_empty()).map_err(|_| Stop::Writer)?;
    }
    Ok(())
}

/// How many streams a client may take back.
struct Allowance {
    left: f64,
    since: Instant,
}

impl Allowance {
    fn new() -> Self {
        Self { left: MOST_RESETS, since: Instant::now() }
    }

    fn take(&mut self) -> bool {
        let now = Instant::now();
        let grown = self.left + (now - self.since).as_secs_f64() * RESETS_A_SECOND;
        self.since = now;
        self.left = grown.min(MOST_RESETS) - 1.0;
        self.left >= 0.0
    }
}

/// What comes from a client, some of which was read already, is seen on its way to the crate.
struct Client<'g> {
    gate: &'g Gate,
    buffer: Buffer,
    stream: TcpStream,
    reader: Reader,
    /// Room for a head that is under way.
    long_head: Option<Share>,
    /// Why nothing more of it reaches the crate.
    fault: Option<Reason>,
    told: Arc<Told>,
}

impl Client<'_> {
    fn poll_bytes(&mut self, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.buffer.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, into);
        }
        let count = self.buffer.data().len().min(into.remaining());
        into.put_slice(&self.buffer.data()[..count]);
        self.buffer.consume(count);
        Poll::Ready(Ok(()))
    }

    fn see(&mut self, bytes: &[u8]) -> Result<(), frames::Fault> {
        let read = self.reader.read(bytes);
        // First of all: streams may end well in what comes before a fault.
        self.tell_malformed()?;
        read?;
        self.make_room()
    }

    fn tell_malformed(&mut self) -> Result<(), frames::Fault> {
        let streams = self.reader.take_malformed();
        if streams.is_empty() {
            return Ok(());
        }
        let malformed = &mut self.told.seen().malformed;
        malformed.extend(streams);
        match malformed.len() > MOST_ERRORS {
            true => Err(TOO_MUCH),
            false => Ok(()),
        }
    }

    /// A head that is under way takes room as one that is whole.
    fn make_room(&mut self) -> Result<(), frames::Fault> {
        let length = self.reader.under_way();
        if self.long_head.is_some() == (length > SHORT_HEAD) {
            return Ok(());
        }
        self.long_head = room_for(self.gate, length).map_err(|fault| {
            self.gate.log_malformed(VERSION, fault, Gist::default());
            TOO_MUCH
        })?;
        self.told.seen().long = self.long_head.is_some();
        self.told.long.notify_one();
        Ok(())
    }
}

/// The connection ends, whatever else is said.
const TOO_MUCH: frames::Fault = frames::Fault { reason: Reason::ENHANCE_YOUR_CALM, before: 0 };

impl AsyncRead for Client<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let begin = into.filled().len();
        if self.fault.is_none() {
            ready!(self.poll_bytes(cx, into))?;
            let Err(fault) = self.see(&into.filled()[begin..]) else { return Poll::Ready(Ok(())) };
            self.fault = Some(fault.reason);
            into.set_filled(begin + fault.before);
            if fault.before > 0 {
                return Poll::Ready(Ok(()));
            }
        }
        // The crate has seen all that comes before.
        self.told.seen().fault = self.fault;
        Poll::Ready(Err(io::ErrorKind::InvalidData.into()))
    }
}

impl AsyncWrite for Client<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
