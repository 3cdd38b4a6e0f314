//! A connection to the API server for those who stay connected: one that dies without a word, as
//! when a node gets another address, is noticed and replaced soon, the token is the one that is in
//! force now, and a server that has too much to do is spared.

mod patience;
mod refusal;
mod token;

use std::{
    error::Error,
    io,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context as Waker, Poll},
    time::Duration,
};

use anyhow::Context;
use http::{Request, Uri};
use hyper_timeout::TimeoutConnector;
use hyper_util::{
    client::legacy,
    rt::{TokioExecutor, TokioIo},
};
use kube::{
    Client, Config,
    client::{Body, ConfigExt},
    config::{KubeConfigOptions, Kubeconfig},
};
use palisade_abi::mark;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::{TcpSocket, TcpStream, lookup_host},
    time::timeout,
};
use tower::{BoxError, Service, ServiceBuilder, service_fn, util::MapRequestLayer};

pub use patience::{CALM, Patience, patient};
use refusal::Refusal;
pub use refusal::{is_refusal, retry_after};
use token::TokenFile;

/// Seconds after which a quiet watch is renewed: a server that hangs, though its machine answers,
/// is noticed within this time.
pub const WATCH_SECONDS: u32 = 60;

/// A quiet connection is asked for a sign of life so often.
const PROBE: Duration = Duration::from_secs(5);
/// A connection whose far end acknowledged nothing for so long is dead.
const DEAD: Duration = Duration::from_secs(15);
/// Until a new connection, handshake included, has failed.
const CONNECT: Duration = Duration::from_secs(10);
/// An address that says nothing for so long has failed, which leaves time for the next one. The API
/// server's Service is such a one before kube-proxy serves it, and what was sent until then does not
/// find the server later either: only another connection does. The kernel calls at once, after one
/// second and after three, and the third call has to be heard.
const SILENT: Duration = Duration::from_millis(3500);
/// Until a request without an answer has failed; longer than any watch is quiet.
const ANSWER: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 10);

/// A client of the server that the kubeconfig leads to, or by default of the cluster in one of
/// whose pods this process runs.
///
/// # Errors
/// The kubeconfig or a file that it names cannot be read, or this process runs in no pod with a
/// service account.
pub async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    let (config, advice) = match kubeconfig {
        None => {
            let config = Config::incluster()
                .context("no --kubeconfig is given, and this is no pod with a service account")?;
            let advice = "where no kube-proxy serves this address, give the API server's own with \
                          apiServer.host of the chart";
            (config, advice.to_owned())
        }
        Some(file) => {
            let kubeconfig = Kubeconfig::read_from(file)
                .with_context(|| format!("cannot read the kubeconfig {}", file.display()))?;
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
            (config, format!("{} says that it is there", file.display()))
        }
    };
    connect(config, advice)
}

/// As `Client::try_from` does it, which has no way to say something about the sockets, and reads a
/// new token late. Who asks in vain asks again by himself, and is to hear of it first.
fn connect(mut config: Config, advice: String) -> anyhow::Result<Client> {
    let ways = Arc::<Ways>::default();
    let file = config.auth_info.token_file.take();
    let auth = config.auth_layer()?;
    // What else the kubeconfig says goes before the file.
    let file = file.filter(|_| auth.is_none());
    let credentials = match &file {
        Some(file) => format!("the token in {file}, which is read anew for each request"),
        None => "what the kubeconfig says of this client, which is read once".to_owned(),
    };
    let token = file.map(TokenFile::open).transpose()?.map(Arc::new);
    let token = token.map(|token| MapRequestLayer::new(move |request| token.authorize(request)));
    let tls = config.rustls_https_connector_with_connector(Tcp(ways.clone()))?;
    let mut connector = TimeoutConnector::new(tls);
    connector.set_connect_timeout(Some(CONNECT));
    connector.set_read_timeout(Some(ANSWER));
    connector.set_reset_reader_on_write(true);
    let connector = Turning { connector, ways };
    let http = legacy::Client::builder(TokioExecutor::new()).build(connector);
    let address = config.cluster_url.to_string();
    let at = address.clone();
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(auth)
        .option_layer(token)
        .layer(config.extra_headers_layer()?)
        .map_err(move |error| unreachable(error, &at, &advice))
        .service(http);
    let client = Client::new(service, config.default_namespace);
    Ok(refusal::named(client, address, credentials))
}

/// The way that connections take: to the Service of the API server as to any other, or past
/// what the agent knows of Services. A server that ends takes its address from its Service, and one
/// that begins elsewhere has another: whoever hears of the next address only through this Service
/// would never hear of it. Where this process may not choose, both ways are the first.
#[derive(Debug, Default)]
struct Ways {
    past_services: AtomicBool,
}

impl Ways {
    fn past_services(&self) -> bool {
        self.past_services.load(Relaxed)
    }

    /// A connection did not come about by a way: the next takes the other one, however many were
    /// tried at once.
    fn failed(&self, past_services: bool) {
        // Somebody turned already.
        let _ =
            self.past_services.compare_exchange(past_services, !past_services, Relaxed, Relaxed);
    }
}

/// Turns to the other way where no server answers, as one that speaks TLS, on this one.
#[derive(Clone)]
struct Turning<C> {
    connector: C,
    ways: Arc<Ways>,
}

impl<C: Service<Uri>> Service<Uri> for Turning<C>
where
    C::Future: Send + 'static,
{
    type Response = C::Response;
    type Error = C::Error;
    type Future = Pin<Box<dyn Future<Output = Result<C::Response, C::Error>> + Send>>;

    fn poll_ready(&mut self, waker: &mut Waker<'_>) -> Poll<Result<(), C::Error>> {
        self.connector.poll_ready(waker)
    }

    fn call(&mut self, server: Uri) -> Self::Future {
        let (ways, way) = (Arc::clone(&self.ways), self.ways.past_services());
        let connecting = self.connector.call(server);
        Box::pin(async move {
            let connected = connecting.await;
            if connected.is_err() {
                ways.failed(way);
            }
            connected
        })
    }
}

/// What is below TLS.
#[derive(Clone, Debug)]
struct Tcp(Arc<Ways>);

impl Service<Uri> for Tcp {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Waker<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, server: Uri) -> Self::Future {
        let past_services = self.0.past_services();
        Box::pin(async move { Ok(TokioIo::new(dial(&server, past_services).await?)) })
    }
}

/// Tries every address of the server.
async fn dial(server: &Uri, past_services: bool) -> io::Result<TcpStream> {
    let host = server.host().unwrap_or_default().trim_matches(['[', ']']);
    let default = if server.scheme_str() == Some("http") { 80 } else { 443 };
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "its name has no address");
    for address in lookup_host((host, server.port_u16().unwrap_or(default))).await? {
        match reach(address, past_services).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

async fn reach(address: SocketAddr, past_services: bool) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    let options = SockRef::from(&socket);
    let keepalive = TcpKeepalive::new().with_time(PROBE).with_interval(PROBE);
    options.set_tcp_keepalive(&keepalive)?;
    options.set_tcp_user_timeout(Some(DEAD))?;
    if past_services {
        // It takes a capability that the operator has not; the agent beside it has.
        let _ = options.set_mark(mark::PAST_SERVICES);
    }
    timeout(SILENT, socket.connect(address)).await?
}

/// The same client, and a flag that is raised whenever the server begins a watch for it. Nothing else
/// tells a server that has no news from one that takes the request and never answers.
pub fn noticing(client: &Client) -> (Client, Arc<AtomicBool>) {
    let (asked, begun) = (client.clone(), Arc::new(AtomicBool::new(false)));
    let raised = Arc::clone(&begun);
    let service = service_fn(move |request: Request<Body>| {
        let (asked, raised) = (asked.clone(), Arc::clone(&raised));
        let watches = request.uri().query().is_some_and(|query| query.contains("watch=true"));
        async move {
            let answer = asked.send(request).await?;
            raised.fetch_or(watches && answer.status().is_success(), Relaxed);
            Ok::<_, kube::Error>(answer)
        }
    });
    (Client::new(service, client.default_namespace()), begun)
}

fn unreachable(error: legacy::Error, address: &str, advice: &str) -> BoxError {
    if !error.is_connect() {
        return error.into();
    }
    let cause = chain(&error);
    let (address, advice) = (address.to_owned(), advice.to_owned());
    Refusal::Unreachable { address, cause, advice }.into()
}

/// What an error says, and what each of its causes adds, down to the first one.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut said: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        next = error.source();
        let mut text = error.to_string();
        match error.downcast_ref() {
            // The server's own words; kube puts everything that it knows of them behind them.
            Some(kube::Error::Api(status)) if !status.message.is_empty() => {
                text.clone_from(&status.message);
                next = None;
            }
            Some(kube::Error::Service(_)) => continue,
            _ => {}
        }
        // Many repeat their cause, which is next.
        let cause = next.map(ToString::to_string);
        let own = cause.and_then(|cause| text.strip_suffix(&cause).map(str::to_owned));
        let own = own.map_or(text, |own| own.trim_end_matches([':', ' ']).to_owned());
        if !own.is_empty() {
            said.push(own);
        }
    }
    said.join(": ")
}

#[cfg(test)]
mod tests {
    use std::io;

    use kube::core::response::Status;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot list: {0}")]
    struct Repeats(#[source] kube::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot connect")]
    struct Silent(#[source] io::Error);

    #[tokio::test]
    async fn the_other_way_is_taken_after_one_that_failed_and_kept_while_it_works() {
        let ways = Arc::<Ways>::default();
        let (works, taken) = (Arc::<AtomicBool>::default(), Arc::clone(&ways));
        let server = works.clone();
        let connector = service_fn(move |_: Uri| {
            let (now, works) = (taken.past_services(), server.load(Relaxed));
            async move { works.then_some(now).ok_or(io::ErrorKind::InvalidData) }
        });
        let turning = Turning { connector, ways: ways.clone() };
        let connect = || turning.clone().call(Uri::from_static("https://10.96.0.1"));
        // A TLS handshake that fails counts, and many at once are one failure.
        let many = [connect(), connect(), connect()];
        for one in many {
            one.await.unwrap_err();
        }
        assert!(ways.past_services());
        works.store(true, Relaxed);
        for _ in 0..3 {
            assert_eq!(connect().await, Ok(true), "what works is kept");
        }
        works.store(false, Relaxed);
        connect().await.unwrap_err();
        assert!(!ways.past_services());
    }

    #[tokio::test]
    async fn an_address_that_says_nothing_leaves_time_for_another_connection() {
        // The kernel says nothing to whom there is no room for.
        let full = TcpSocket::new_v4().unwrap();
        full.bind(([127, 0, 0, 1], 0).into()).unwrap();
        let full = full.listen(0).unwrap();
        let address = full.local_addr().unwrap();
        let _room = TcpStream::connect(address).await.unwrap();
        let tried = timeout(CONNECT / 2, reach(address, false)).await;
        let failure = tried.expect("given up in time").unwrap_err();
        assert_eq!(failure.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn every_cause_is_told_once_and_an_answer_in_the_servers_words() {
        let refused = || Silent(io::ErrorKind::ConnectionRefused.into());
        let service = || kube::Error::Service(Box::new(refused()));
        assert_eq!(chain(&service()), "cannot connect: connection refused");
        assert_eq!(chain(&Repeats(service())), "cannot list: cannot connect: connection refused");
        let status = Status { message: "no such name".into(), code: 422, ..Status::default() };
        let answer = kube::Error::Api(Box::new(status));
        assert_eq!(chain(&Repeats(answer)), "cannot list: no such name");
    }
}
