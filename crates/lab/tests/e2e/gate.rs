//! A gate in front of the lab's API server: it knows the token that is in force, and turns requests
//! away on command, as a real server does.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use http::{Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use kube::{
    Client, Config,
    client::Body,
    config::{KubeConfigOptions, Kubeconfig},
};
use palisade_api::replace::{Lasting, replace};
use palisade_lab::{
    layout::{FABRIC_NETNS, FABRIC_V4},
    sys::netns,
};
use tokio::{net::TcpStream, runtime::Runtime, sync::watch};

use super::harness::Lab;

/// Port of the gate, beside the API server's.
const PORT: u16 = 7443;

/// The gate; it closes with the test.
pub(crate) struct Gate {
    shared: Arc<Shared>,
    token: PathBuf,
    _runtime: Runtime,
}

struct Shared {
    server: Client,
    state: Mutex<State>,
    cut: watch::Sender<()>,
}

struct State {
    accepted: String,
    refusal: Option<Refusal>,
    seen: Vec<Seen>,
}

/// Who is turned away, and how.
#[derive(Clone, Copy)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    /// In seconds.
    pub(crate) retry_after: u64,
    pub(crate) whom: fn(&Asked) -> bool,
}

/// What somebody asked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Asked {
    pub(crate) by: IpAddr,
    pub(crate) method: String,
    pub(crate) path: String,
}

/// A request, and what became of it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) asked: Asked,
    pub(crate) at: Instant,
    pub(crate) status: StatusCode,
}

impl Gate {
    /// From now on the nodes' programs that start come through the gate, with `token`.
    pub(crate) fn new(lab: &Lab, token: &str) -> Self {
        let runtime = Runtime::new().unwrap();
        let server = runtime.block_on(async {
            let kubeconfig = Kubeconfig::read_from(lab.kubeconfig()).unwrap();
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
            Client::try_from(config).unwrap()
        });
        let state = State { accepted: token.into(), refusal: None, seen: Vec::new() };
        let shared =
            Arc::new(Shared { server, state: Mutex::new(state), cut: watch::Sender::new(()) });
        let listen = || TcpListener::bind((FABRIC_V4, PORT));
        let listener = netns::run_in(&netns::path(FABRIC_NETNS), listen).unwrap();
        runtime.spawn(accept(shared.clone(), listener));
        let file = lab.node_kubeconfig().with_file_name("token");
        let gate = Self { shared, token: file, _runtime: runtime };
        gate.issue(token);
        let kubeconfig = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: gate\n\
             contexts: [{{name: gate, context: {{cluster: gate, user: gate}}}}]\n\
             clusters: [{{name: gate, cluster: {{server: 'http://{FABRIC_V4}:{PORT}'}}}}]\n\
             users: [{{name: gate, user: {{tokenFile: {}}}}}]\n",
            gate.token.display()
        );
        replace(&lab.node_kubeconfig(), kubeconfig.as_bytes(), Lasting::UntilBoot).unwrap();
        gate
    }

    /// As [`Gate::new`], and the agents of all nodes do already.
    pub(crate) fn for_agents(lab: &Lab, nodes: u8, token: &str) -> Self {
        let gate = Self::new(lab, token);
        (1..=nodes.into()).for_each(|number| lab.replace_agent(number));
        gate
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }

    /// Puts a token into the file, as the kubelet does.
    pub(crate) fn issue(&self, token: &str) {
        replace(&self.token, token.as_bytes(), Lasting::UntilBoot).unwrap();
    }

    /// The only token that is good from now on. Watches that are open stay open.
    pub(crate) fn accept(&self, token: &str) {
        self.state().accepted = token.into();
    }

    /// Who is turned away from now on.
    pub(crate) fn refuse(&self, refusal: Option<Refusal>) {
        self.state().refusal = refusal;
    }

    /// Ends all connections.
    pub(crate) fn cut(&self) {
        self.shared.cut.send_replace(());
    }

    /// What was asked since `begun`.
    pub(crate) fn seen(&self, begun: Instant) -> Vec<Seen> {
        self.state().seen.iter().filter(|seen| seen.at >= begun).cloned().collect()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer to who is turned away; it is noted who asked.
    fn turn_away(&self, by: IpAddr, request: &Request<Incoming>) -> Option<Response<Body>> {
        let mut state = self.state();
        let asked = Asked {
            by,
            method: request.method().to_string(),
            path: request.uri().path().to_owned(),
        };
        let bearer = format!("Bearer {}", state.accepted);
        let known = request.headers().get(header::AUTHORIZATION).is_some_and(|it| *it == *bearer);
        let refusal = state.refusal.filter(|refusal| known && (refusal.whom)(&asked));
        let status = match refusal {
            _ if !known => StatusCode::UNAUTHORIZED,
            Some(refusal) => refusal.status,
            None => StatusCode::OK,
        };
        state.seen.push(Seen { asked, at: Instant::now(), status });
        (status != StatusCode::OK).then(|| {
            let mut answer = Response::new(Body::from(b"Not now.\n".to_vec()));
            *answer.status_mut() = status;
            let after = refusal.map(|refusal| (header::RETRY_AFTER, refusal.retry_after.into()));
            answer.headers_mut().extend(after);
            answer
        })
    }
}

async fn accept(shared: Arc<Shared>, listener: TcpListener) {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    loop {
        let (stream, from) = listener.accept().await.unwrap();
        tokio::spawn(serve(shared.clone(), stream, from));
    }
}

async fn serve(shared: Arc<Shared>, stream: TcpStream, from: SocketAddr) {
    let mut cut = shared.cut.subscribe();
    let service = service_fn(move |request| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(answer(&shared, from.ip(), request).await) }
    });
    let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        _ = connection => {}
        _ = cut.changed() => {}
    }
}

async fn answer(shared: &Shared, by: IpAddr, request: Request<Incoming>) -> Response<Body> {
    if let Some(answer) = shared.turn_away(by, &request) {
        return answer;
    }
    let (mut head, body) = request.into_parts();
    head.headers.remove(header::AUTHORIZATION);
    head.headers.remove(header::HOST);
    let Ok(body) = body.collect().await else { return bad_gateway() };
    let request = Request::from_parts(head, Body::from(body.to_bytes()));
    let Ok(mut answer) = shared.server.send(request).await else { return bad_gateway() };
    answer.headers_mut().remove(header::TRANSFER_ENCODING);
    answer
}

fn bad_gateway() -> Response<Body> {
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = StatusCode::BAD_GATEWAY;
    answer
}
