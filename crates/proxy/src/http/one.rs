//! A connection over HTTP/1: one request after the other, each judged, each answered in its turn.
//!
//! The connection to the server belongs to that of the client. It is made for the first request
//! that is allowed and ends with the client's; whatever is not in order on either ends both.

use std::{
    future::poll_fn,
    io,
    pin::pin,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    task::Poll,
    time::Duration,
};

use palisade_policy::l7::Unwritable;
use tokio::{
    net::TcpStream,
    task::yield_now,
    time::{Instant, timeout, timeout_at},
};

use super::{
    HEAD_TIME, IDLE_TIME, LATE, MANY_INTERIM, MOST_INTERIM, UNHEARD,
    activity::Activity,
    alarm::Alarm,
    body::{Framing, Piece, Reader},
    may_trail,
    reply::Reply,
    request::{Request, read_method},
    response::Response,
    room_for,
    syntax::{Fields, Malformed, Scanner},
};
use crate::{
    buffer::{Buffer, Room, write_all},
    judge::{Asked, Gate, Judged},
    log::Gist,
    net, relay,
    rules::Changes,
    shares::Share,
};

/// Of a body that nobody wants, before the connection is closed instead.
const MOST_DRAINED: u64 = 64 << 10;
/// For the client to hear the last answer.
const LINGER_TIME: Duration = Duration::from_secs(1);
/// Bytes that are copied together, so that they need one write.
const GATHER: usize = 16 << 10;

/// Serves the connection to its end. The first head, of which the buffer holds a part, has to be
/// there at the deadline.
pub(super) async fn serve(gate: &Gate, client: TcpStream, buffer: Buffer, deadline: Instant) {
    let mut connection = Connection {
        gate,
        client,
        buffer,
        room: None,
        server: None,
        changes: gate.changes(),
        alarm: Alarm::new(deadline),
    };
    if connection.serve(deadline).await.is_err() {
        net::reset(&connection.client);
        if let Some(server) = &connection.server {
            net::reset(&server.stream);
        }
    }
}

/// The connection is of no more use: both sides are reset.
struct Broken;

impl From<io::Error> for Broken {
    fn from(_: io::Error) -> Self {
        Self
    }
}

impl From<tokio::time::error::Elapsed> for Broken {
    fn from(_: tokio::time::error::Elapsed) -> Self {
        Self
    }
}

/// What comes after a request.
enum Next {
    Request,
    Close,
}

/// What an answer means for the connection.
enum Answered {
    /// Another request may follow.
    Kept,
    /// It was the last one.
    Last,
    /// Both sides speak another protocol now.
    Switched,
}

struct Server {
    stream: TcpStream,
    buffer: Buffer,
}

impl Server {
    /// Whether it ended, or says what nobody asked for.
    fn speaks(&self) -> bool {
        let read = self.stream.try_read(&mut [0]);
        !read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }
}

struct Connection<'g> {
    gate: &'g Gate,
    client: TcpStream,
    buffer: Buffer,
    /// What the head takes that was read last, if it is long.
    room: Option<Share>,
    server: Option<Server>,
    changes: Changes,
    /// Rings when nothing came for long.
    alarm: Alarm,
}

/// What a connection waits for.
enum Event {
    /// The rules changed.
    Changed,
    /// The client has something to say, or ended.
    Client,
    /// So does the server.
    Server,
    /// Nothing, for long.
    Late,
}

impl Connection<'_> {
    async fn serve(&mut self, deadline: Instant) -> Result<(), Broken> {
        let mut deadline = Some(deadline);
        loop {
            let head = match self.read_head(deadline.take()).await? {
                Some(Ok(head)) => head,
                Some(Err(fault)) => {
                    return self.refuse(fault, Gist::of_head(self.buffer.data())).await;
                }
                None => return Ok(()),
            };
            let data = &self.buffer.data()[..head];
            let request = Request::read(data).map_err(|fault| (fault, Gist::of_head(data)));
            self.buffer.consume(head);
            let request = match request {
                Ok(request) => request,
                Err((fault, gist)) => return self.refuse(fault, gist).await,
            };
            if let Next::Close = self.answer(request).await? {
                return self.linger().await;
            }
            // Whoever asks on without waiting for anything leaves others their turns.
            if !self.buffer.is_empty() {
                yield_now().await;
            }
        }
    }

    /// Waits for the head of the next request; `None` when either side ends the connection. The
    /// deadline, if one is set already, is that of a head that has begun.
    async fn read_head(
        &mut self,
        mut deadline: Option<Instant>,
    ) -> Result<Option<Result<usize, Malformed>>, Broken> {
        self.room = None;
        self.buffer.shrink();
        if self.buffer.is_empty() {
            if !self.hear().await {
                return Ok(None);
            }
            deadline = None;
        }
        if self.buffer.data().starts_with(b"\r\n") {
            self.buffer.consume(2);
        }
        let mut scanner = Scanner::default();
        loop {
            let data = self.buffer.data();
            let found = match read_method(data).and_then(|_| scanner.find(data)) {
                Ok(found) => found,
                Err(fault) => return Ok(Some(Err(fault))),
            };
            if self.room.is_none() {
                self.room = match room_for(self.gate, found.unwrap_or(data.len())) {
                    Ok(room) => room,
                    Err(fault) => return Ok(Some(Err(fault))),
                };
            }
            if let Some(length) = found {
                return Ok(Some(Ok(length)));
            }
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + HEAD_TIME);
            match timeout_at(deadline, self.buffer.fill(&self.client)).await {
                Ok(Ok(1..)) => {}
                Ok(_) => return Err(Broken),
                Err(_) => {
                    return Ok(Some(Err(LATE)));
                }
            }
        }
    }

    /// Waits for the first bytes of a request; `false` when either side ends the connection.
    async fn hear(&mut self) -> bool {
        self.alarm.set(Instant::now() + IDLE_TIME);
        if self.gate.is_forgotten() {
            return false;
        }
        loop {
            match self.wait(true).await {
                Event::Changed if self.gate.is_forgotten() => return false,
                Event::Changed => {}
                Event::Client => match self.buffer.take(&self.client) {
                    Ok(Some(1..)) => return true,
                    Ok(None) => {}
                    _ => return false,
                },
                Event::Server if self.server.as_ref().is_some_and(Server::speaks) => return false,
                Event::Server => {}
                Event::Late => return false,
            }
        }
    }

    /// Waits for what comes first; for the client only if that is listened to.
    async fn wait(&mut self, listens: bool) -> Event {
        let Self { client, server, changes, alarm, .. } = self;
        poll_fn(|cx| {
            if changes.poll(cx).is_ready() {
                return Poll::Ready(Event::Changed);
            }
            if listens && client.poll_read_ready(cx).is_ready() {
                return Poll::Ready(Event::Client);
            }
            if server.as_ref().is_some_and(|server| server.stream.poll_read_ready(cx).is_ready()) {
                return Poll::Ready(Event::Server);
            }
            alarm.poll(cx).map(|()| Event::Late)
        })
        .await
    }

    /// Answers what is no request. Nothing that follows can be told apart.
    async fn refuse(&mut self, fault: Malformed, gist: Gist) -> Result<(), Broken> {
        self.gate.log_malformed("HTTP/1.1", fault, gist);
        self.reply(Reply::malformed(fault), false, true).await?;
        self.linger().await
    }

    /// A client that does not take it for long is gone.
    async fn reply(&self, reply: Reply, head_only: bool, close: bool) -> Result<(), Broken> {
        let mut out = Vec::with_capacity(256);
        reply.write(&mut out, head_only, close);
        Ok(timeout(IDLE_TIME, write_all(&self.client, &out)).await??)
    }

    /// Judges a request and sees it answered.
    async fn answer(&mut self, mut request: Request) -> Result<Next, Broken> {
        let asked = Asked {
            version: if request.old { "HTTP/1.0" } else { "HTTP/1.1" },
            method: &request.method,
            target: request.target.as_str(),
            authority: &request.authority,
            begun: std::time::Instant::now(),
        };
        let judge = || self.gate.judge(&asked, &request.fields.iter().collect::<Vec<_>>());
        let mut judged = judge();
        while judged.allowed && self.server.is_none() {
            let connected = tokio::select! {
                biased;
                () = self.gate.revoked(&asked, &judged, &request.fields) => {
                    judged = judge();
                    continue;
                }
                connected = self.gate.connect() => connected,
            };
            let Ok(stream) = connected else {
                self.gate.log(&asked, &judged, Some(503), Some(Gate::UNREACHABLE));
                return self.answer_alone(&request, Reply::NO_SERVER).await;
            };
            self.server = Some(Server { stream, buffer: Buffer::default() });
        }
        if self.gate.is_forgotten() {
            self.gate.log_cut(&asked, &request.fields);
            return Err(Broken);
        }
        if !judged.allowed {
            return self.deny(&request, &asked, &judged, None).await;
        }
        // Whether it still is allowed, when the rules change, is asked of the request as it came.
        let came = judged.edits_fields().then(|| request.fields.clone());
        if judged.edit(&mut request.fields).is_err() {
            let judged = judged.refused();
            return self.deny(&request, &asked, &judged, Some(Unwritable::WHY)).await;
        }
        let came = came.as_ref().unwrap_or(&request.fields);
        self.exchange(&request, came, &asked, &judged).await
    }

    async fn deny(
        &mut self,
        request: &Request,
        asked: &Asked<'_>,
        judged: &Judged,
        why: Option<&str>,
    ) -> Result<Next, Broken> {
        self.gate.log(asked, judged, Some(403), why);
        self.answer_alone(request, Reply::DENIED).await
    }

    /// Answers in the server's place, and gets the body out of the way.
    async fn answer_alone(&mut self, request: &Request, reply: Reply) -> Result<Next, Broken> {
        let long = match request.body {
            Framing::None => false,
            Framing::Length(length) => length > MOST_DRAINED,
            _ => true,
        };
        let close = request.close || request.expects || long;
        self.reply(reply, request.method == "HEAD", close).await?;
        if close {
            return Ok(Next::Close);
        }
        let mut reader = Reader::new(request.body);
        loop {
            let (used, piece) = reader.next(self.buffer.data()).map_err(|_| Broken)?;
            let more = piece == Piece::More;
            self.buffer.consume(used);
            if reader.is_complete() {
                return Ok(Next::Request);
            }
            if more && timeout(HEAD_TIME, self.buffer.fill(&self.client)).await?? == 0 {
                return Err(Broken);
            }
        }
    }

    /// Forwards the request and its answer, as long as what `came` is allowed.
    async fn exchange(
        &mut self,
        request: &Request,
        came: &Fields,
        asked: &Asked<'_>,
        judged: &Judged,
    ) -> Result<Next, Broken> {
        let head = self.send_head(request);
        if head.is_empty() {
            match self.exchange_shortly(request, came, asked, judged).await {
                Ok(Some(next)) => return Ok(next),
                Ok(None) => {}
                Err(fault) => return self.break_off(request, asked, judged, fault).await,
            }
        }
        self.exchange_at_length(request, head, came, asked, judged).await
    }

    /// Sends the head of a request without a body as far as the server takes it at once; returns the
    /// rest. One with a body goes out together with that.
    fn send_head(&self, request: &Request) -> Vec<u8> {
        let mut head = Room::new();
        request.write(&mut head);
        let server = self.server.as_ref().filter(|_| request.body == Framing::None);
        // An error comes again when the rest is sent.
        let sent = server.and_then(|server| server.stream.try_write(&head).ok());
        head[sent.unwrap_or_default()..].to_vec()
    }

    /// The way of most exchanges: the server has the request, which has no body, and the whole answer
    /// comes at once. `None` where it does not.
    async fn exchange_shortly(
        &mut self,
        request: &Request,
        came: &Fields,
        asked: &Asked<'_>,
        judged: &Judged,
    ) -> Result<Option<Next>, Fault> {
        self.wait_for_answer(request, came, asked).await?;
        let Some(server) = &mut self.server else { return Err(Fault::Broken) };
        let data = server.buffer.data();
        let Ok(Some(head)) = Scanner::default().find(data) else { return Ok(None) };
        let (head, rest) = data.split_at(head);
        let Ok(response) = Response::read(head, request) else { return Ok(None) };
        let Some(body) = response.body.of_length().and_then(|length| rest.get(..length)) else {
            return Ok(None);
        };
        if (100..200).contains(&response.status) {
            return Ok(None);
        }
        self.gate.log(asked, judged, Some(response.status), None);
        let close = request.close || response.close;
        let mut out = Room::new();
        response.write(&mut out, response.body, close);
        out.extend_from_slice(body);
        let length = head.len() + body.len();
        server.buffer.consume(length);
        let ends = close || !server.buffer.is_empty();
        self.say(came, asked, judged, &out).await?;
        Ok(Some(if ends { Next::Close } else { Next::Request }))
    }

    /// Waits for the server to begin its answer, or to end. The client may ask for more meanwhile.
    async fn wait_for_answer(
        &mut self,
        request: &Request,
        came: &Fields,
        asked: &Asked<'_>,
    ) -> Result<(), Fault> {
        self.alarm.set(Instant::from_std(asked.begun) + IDLE_TIME);
        let mut listens = self.buffer.is_empty() && !request.websocket;
        loop {
            let event = self.wait(listens).await;
            let Some(server) = &mut self.server else { return Err(Fault::Broken) };
            match event {
                // It may be a change of before the request was judged.
                Event::Changed if self.gate.allows(asked, came) => {}
                Event::Changed => {
                    self.gate.log_cut(asked, came);
                    return Err(Fault::Broken);
                }
                Event::Client => {
                    let read = self.buffer.take(&self.client).map_err(|_| Fault::Client)?;
                    listens = read.is_none();
                    if read == Some(0) {
                        _ = socket2::SockRef::from(&server.stream)
                            .shutdown(std::net::Shutdown::Write);
                    }
                }
                Event::Server => match server.buffer.take(&server.stream) {
                    Ok(Some(1..)) => return Ok(()),
                    Ok(None) => {}
                    _ => return Err(Fault::Gone),
                },
                Event::Late => return Err(Fault::Late),
            }
        }
    }

    /// Gives the client a whole answer, as long as it may have it.
    async fn say(
        &self,
        came: &Fields,
        asked: &Asked<'_>,
        judged: &Judged,
        answer: &[u8],
    ) -> Result<(), Fault> {
        let taken = self.client.try_write(answer).unwrap_or_default();
        if taken == answer.len() {
            return Ok(());
        }
        tokio::select! {
            biased;
            () = self.gate.revoked(asked, judged, came) => {
                self.gate.log_cut(asked, came);
                Err(Fault::Broken)
            }
            written = timeout(IDLE_TIME, write_all(&self.client, &answer[taken..])) => match written {
                Ok(Ok(())) => Ok(()),
                _ => Err(Fault::Broken),
            },
        }
    }

    /// The way of all other exchanges. `head` is what the server has not taken yet of the request's.
    async fn exchange_at_length(
        &mut self,
        request: &Request,
        head: Vec<u8>,
        came: &Fields,
        asked: &Asked<'_>,
        judged: &Judged,
    ) -> Result<Next, Broken> {
        let Some(server) = &mut self.server else { return Err(Broken) };
        let sent = AtomicBool::new(false);
        let begun = AtomicBool::new(false);
        let activity = Activity::new();
        let outcome = {
            let way = (&self.client, &server.stream);
            let mut upload = pin!(upload(request, head, way, &mut self.buffer, &sent, &activity));
            let mut uploading = true;
            let download = Download {
                gate: self.gate,
                client: &self.client,
                server: &server.stream,
                request,
                asked,
                judged,
                sent: &sent,
                begun: &begun,
                activity: &activity,
            };
            let mut download = pin!(download.run(&mut server.buffer));
            let mut revoked = pin!(self.gate.revoked(asked, judged, came));
            loop {
                tokio::select! {
                    // First of all: what is no longer allowed does not go on.
                    biased;
                    () = &mut revoked => {
                        self.gate.log_cut(asked, came);
                        break Err(Fault::Broken);
                    }
                    fault = &mut upload, if uploading => match fault {
                        // The server may have answered before it stopped listening.
                        Ok(()) => uploading = false,
                        Err(fault) => break Err(fault),
                    },
                    outcome = &mut download => break outcome,
                }
            }
        };
        match outcome {
            Ok(Answered::Switched) => self.tunnel(came, asked, judged).await,
            Ok(Answered::Kept) if sent.load(Relaxed) && server.buffer.is_empty() => {
                Ok(Next::Request)
            }
            // The rest of the body, or of what the server says, belongs to nothing any more.
            Ok(_) => Ok(Next::Close),
            Err(fault) if begun.load(Relaxed) => {
                tracing::debug!(?fault, "an exchange broke off");
                Err(Broken)
            }
            Err(fault) => self.break_off(request, asked, judged, fault).await,
        }
    }

    /// An exchange failed before the client heard anything.
    async fn break_off(
        &mut self,
        request: &Request,
        asked: &Asked<'_>,
        judged: &Judged,
        fault: Fault,
    ) -> Result<Next, Broken> {
        if let Some(server) = self.server.take() {
            net::reset(&server.stream);
        }
        let (reply, why) = match fault {
            Fault::Broken => return Err(Broken),
            Fault::Client => {
                self.gate.log(asked, judged, None, Some(UNHEARD));
                return Err(Broken);
            }
            Fault::Request(fault) => (Reply::malformed(fault), fault.why),
            Fault::Response(fault) => (Reply::NO_ANSWER, fault.why),
            Fault::Gone => (Reply::NO_SERVER, "the server went away before it answered"),
            Fault::Late => (Reply::LATE, "the server did not answer in time"),
        };
        self.gate.log(asked, judged, Some(reply.status), Some(why));
        self.reply(reply, request.method == "HEAD", true).await?;
        Ok(Next::Close)
    }

    /// Both sides speak another protocol from here on, as long as the request for it is allowed.
    async fn tunnel(
        &mut self,
        came: &Fields,
        asked: &Asked<'_>,
        judged: &Judged,
    ) -> Result<Next, Broken> {
        let Some(server) = &mut self.server else { return Err(Broken) };
        let client = (&self.client, &mut self.buffer);
        tokio::select! {
            biased;
            () = self.gate.revoked(asked, judged, came) => {
                self.gate.log_cut(asked, came);
                return Err(Broken);
            }
            relayed = relay::run(client, (&server.stream, &mut server.buffer)) => relayed?,
        }
        Ok(Next::Close)
    }

    /// Ends the connection so that the client gets to hear the last answer: a reset, which unread
    /// bytes would cause, could overtake it.
    async fn linger(&mut self) -> Result<(), Broken> {
        self.server = None;
        socket2::SockRef::from(&self.client).shutdown(std::net::Shutdown::Write)?;
        let mut left = MOST_DRAINED;
        let drained = timeout(LINGER_TIME, async {
            while left > 0 {
                self.buffer.consume(self.buffer.data().len());
                match self.buffer.fill(&self.client).await {
                    Ok(0) | Err(_) => return,
                    Ok(count) => left = left.saturating_sub(count as u64),
                }
            }
        });
        _ = drained.await;
        Ok(())
    }
}

/// Why an exchange ended early.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// The client must hear no more, or is gone after it was told how its request was answered.
    Broken,
    /// The client is gone, and nothing was told yet.
    Client,
    /// The client's body is none.
    Request(Malformed),
    /// The server's answer is none.
    Response(Malformed),
    /// The server is gone.
    Gone,
    /// The server takes too long.
    Late,
}

/// Sends the request, whose head or what is left of it is given, then hands on the client's end of
/// the stream.
async fn upload(
    request: &Request,
    head: Vec<u8>,
    (client, server): (&TcpStream, &TcpStream),
    buffer: &mut Buffer,
    sent: &AtomicBool,
    activity: &Activity,
) -> Result<(), Fault> {
    let mut out = Outlet { stream: server, bytes: head, framing: request.body, activity };
    let mut reader = Reader::new(request.body);
    match hand_on(&mut reader, buffer, client, &mut out).await {
        Ok(()) => {}
        Err(Stopped::Malformed(fault)) => return Err(Fault::Request(fault)),
        Err(Stopped::Source) => return Err(Fault::Client),
        Err(Stopped::Sink) => return Ok(()),
    }
    // Trailers of requests do not pass: the request was judged without them.
    if out.end(&[]).await.is_err() {
        return Ok(());
    }
    sent.store(true, Relaxed);
    if buffer.is_empty()
        && !request.websocket
        && buffer.fill(client).await.map_err(|_| Fault::Client)? == 0
    {
        _ = socket2::SockRef::from(server).shutdown(std::net::Shutdown::Write);
    }
    Ok(())
}

/// Why a body was not handed on to its end.
enum Stopped {
    /// It is none.
    Malformed(Malformed),
    /// Its sender is gone, or says nothing for long.
    Source,
    /// Nobody takes it.
    Sink,
}

/// Hands a body on as it comes. What follows it stays in the buffer.
async fn hand_on(
    reader: &mut Reader,
    buffer: &mut Buffer,
    from: &TcpStream,
    to: &mut Outlet<'_>,
) -> Result<(), Stopped> {
    loop {
        let (used, piece) = reader.next(buffer.data()).map_err(Stopped::Malformed)?;
        let (more, written) = match piece {
            Piece::Data(data) => (false, to.data(data).await),
            Piece::More => (true, to.flush().await),
            Piece::End => {
                buffer.consume(used);
                return Ok(());
            }
        };
        buffer.consume(used);
        written.map_err(|_| Stopped::Sink)?;
        if !more {
            continue;
        }
        match to.activity.within(buffer.fill(from)).await {
            Some(Ok(1..)) => {}
            Some(Ok(0)) if reader.may_end() => return Ok(()),
            _ => return Err(Stopped::Source),
        }
    }
}

/// Forwards the answer.
struct Download<'a> {
    gate: &'a Gate,
    client: &'a TcpStream,
    server: &'a TcpStream,
    request: &'a Request,
    asked: &'a Asked<'a>,
    judged: &'a Judged,
    /// The server has the whole request.
    sent: &'a AtomicBool,
    /// The client has a part of the answer.
    begun: &'a AtomicBool,
    activity: &'a Activity,
}

impl Download<'_> {
    async fn run(self, buffer: &mut Buffer) -> Result<Answered, Fault> {
        let response = self.final_head(buffer).await?;
        let framing = match response.body {
            Framing::Chunked | Framing::UntilClose if self.request.old => Framing::UntilClose,
            Framing::UntilClose => Framing::Chunked,
            framing => framing,
        };
        let close = self.request.close || response.close || !self.sent.load(Relaxed);
        self.gate.log(self.asked, self.judged, Some(response.status), None);
        let mut bytes = Vec::with_capacity(1024);
        response.write(&mut bytes, framing, close);
        let mut out = Outlet { stream: self.client, bytes, framing, activity: self.activity };
        self.begun.store(true, Relaxed);
        if response.status == 101 {
            out.flush().await.map_err(|_| Fault::Broken)?;
            return Ok(Answered::Switched);
        }
        self.body(Reader::new(response.body), &mut out, buffer).await?;
        Ok(if close { Answered::Last } else { Answered::Kept })
    }

    /// The first answer that is not interim; those before it are handed on.
    async fn final_head(&self, buffer: &mut Buffer) -> Result<Response, Fault> {
        for _ in 0..=MOST_INTERIM {
            let length = self.head(buffer).await?;
            let response = Response::read(&buffer.data()[..length], self.request);
            buffer.consume(length);
            let response = response.map_err(Fault::Response)?;
            if !response.is_interim() {
                return Ok(response);
            }
            if self.request.old {
                continue;
            }
            let mut out = Vec::new();
            response.write(&mut out, Framing::None, false);
            let written = self.activity.within(write_all(self.client, &out)).await;
            written.and_then(Result::ok).ok_or(Fault::Client)?;
        }
        Err(Fault::Response(MANY_INTERIM))
    }

    async fn head(&self, buffer: &mut Buffer) -> Result<usize, Fault> {
        let mut scanner = Scanner::default();
        loop {
            match scanner.find(buffer.data()) {
                Ok(Some(length)) => return Ok(length),
                Ok(None) => {}
                Err(fault) => return Err(Fault::Response(fault)),
            }
            match self.activity.within(buffer.fill(self.server)).await {
                Some(Ok(1..)) => {}
                Some(_) => return Err(Fault::Gone),
                None => return Err(Fault::Late),
            }
        }
    }

    async fn body(
        &self,
        mut reader: Reader,
        out: &mut Outlet<'_>,
        buffer: &mut Buffer,
    ) -> Result<(), Fault> {
        hand_on(&mut reader, buffer, self.server, out).await.map_err(|stopped| match stopped {
            Stopped::Malformed(fault) => Fault::Response(fault),
            Stopped::Source => Fault::Gone,
            Stopped::Sink => Fault::Broken,
        })?;
        let trailers: Vec<_> =
            reader.trailers().iter().filter(|(name, _)| may_trail(name)).collect();
        out.end(&trailers).await.map_err(|_| Fault::Broken)
    }
}

/// The way out of a message: head and small parts of the body together.
struct Outlet<'s> {
    stream: &'s TcpStream,
    bytes: Vec<u8>,
    framing: Framing,
    activity: &'s Activity,
}

impl Outlet<'_> {
    async fn data(&mut self, data: &[u8]) -> io::Result<()> {
        let chunked = self.framing == Framing::Chunked;
        if chunked {
            self.bytes.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
        }
        if self.bytes.len() + data.len() > GATHER {
            self.flush().await?;
            self.write(data).await?;
        } else {
            self.bytes.extend_from_slice(data);
        }
        if chunked {
            self.bytes.extend_from_slice(b"\r\n");
        }
        Ok(())
    }

    async fn end(&mut self, trailers: &[(&str, &[u8])]) -> io::Result<()> {
        if self.framing == Framing::Chunked {
            self.bytes.extend_from_slice(b"0\r\n");
            for (name, value) in trailers {
                super::syntax::write_field(&mut self.bytes, name, value);
            }
            self.bytes.extend_from_slice(b"\r\n");
        }
        self.flush().await
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.write(&self.bytes).await?;
        self.bytes.clear();
        Ok(())
    }

    /// A reader that takes nothing for long is gone.
    async fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let written = self.activity.within(write_all(self.stream, bytes)).await;
        written.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()))
    }
}
