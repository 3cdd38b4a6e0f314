//! gRPC as programs speak it: tonic on both ends.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod world;

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use bytes::{Buf, BufMut};
use futures::{Stream, StreamExt, channel::mpsc, future, stream};
use palisade_api::flow::L7;
use tokio::runtime::{Builder, Runtime};
use tonic::{
    Code, Request, Response, Status, Streaming,
    body::Body,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint},
};
use tower::service_fn;
use world::{
    Namespace, SERVER4, SERVER6, World,
    agent::{http, rules},
};

/// Messages that are text.
#[derive(Clone, Copy)]
struct Text;

impl Codec for Text {
    type Encode = String;
    type Decode = String;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Text {
    type Item = String;
    type Error = Status;

    fn encode(&mut self, text: String, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put_slice(text.as_bytes());
        Ok(())
    }
}

impl Decoder for Text {
    type Item = String;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<String>, Status> {
        let bytes = from.copy_to_bytes(from.remaining()).to_vec();
        String::from_utf8(bytes).map(Some).map_err(|_| Status::data_loss("no text"))
    }
}

type Many = std::pin::Pin<Box<dyn Stream<Item = Result<String, Status>> + Send>>;

/// Methods that the server was asked for, whatever it made of them.
type Asked = Arc<Mutex<Vec<String>>>;

async fn answer(asked: Asked, request: http::Request<Body>) -> http::Response<Body> {
    let path = request.uri().path().to_owned();
    asked.lock().unwrap().push(path.clone());
    let mut grpc = tonic::server::Grpc::new(Text);
    match path.as_str() {
        "/x.Greeter/Say" => {
            let say = |request: Request<String>| {
                let text = request.into_inner();
                let answer = match text.as_str() {
                    "nobody" => Err(Status::not_found("nobody is there")),
                    _ => Ok(Response::new(format!("hello {text}"))),
                };
                future::ready(answer)
            };
            grpc.unary(service_fn(say), request).await
        }
        "/x.Greeter/Count" => {
            let count = |request: Request<String>| {
                let end: u32 = request.into_inner().parse().unwrap();
                let numbers = stream::iter((0..end).map(|n| Ok(n.to_string())));
                future::ok::<_, Status>(Response::new(numbers.boxed()))
            };
            grpc.server_streaming(service_fn(count), request).await
        }
        "/x.Greeter/Join" => {
            let join = |request: Request<Streaming<String>>| async {
                let words: Vec<_> = request.into_inner().map(Result::unwrap).collect().await;
                Ok::<_, Status>(Response::new(words.concat()))
            };
            grpc.client_streaming(service_fn(join), request).await
        }
        _ => {
            let echo = |request: Request<Streaming<String>>| {
                let echo: Many = request.into_inner().boxed();
                future::ok::<_, Status>(Response::new(echo))
            };
            grpc.streaming(service_fn(echo), request).await
        }
    }
}

/// A runtime whose thread lives in a namespace.
fn runtime(namespace: &Namespace) -> Runtime {
    namespace.run(|| Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap())
}

fn serve(runtime: &Runtime) -> Asked {
    let asked = Asked::default();
    let own = Arc::clone(&asked);
    let service = service_fn(move |request| {
        let answer = answer(Arc::clone(&own), request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, world::PORT));
    runtime.spawn(async move { tonic::transport::Server::builder().serve(address, service).await });
    asked
}

/// A client, once the server listens.
fn client(runtime: &Runtime, server: IpAddr) -> Grpc<Channel> {
    let address = SocketAddr::new(server, world::PORT);
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    // In the runtime's own thread, which is in the client's namespace.
    let connecting = runtime.spawn(async move { endpoint.connect().await.unwrap() });
    Grpc::new(runtime.block_on(connecting).unwrap())
}

fn path(method: &str) -> http::uri::PathAndQuery {
    format!("/x.Greeter/{method}").parse().unwrap()
}

/// The client, once it can take a call.
async fn ready(client: &mut Grpc<Channel>) -> &mut Grpc<Channel> {
    client.ready().await.unwrap();
    client
}

/// One message, and the outcome of the call.
async fn say(client: &mut Grpc<Channel>, method: &str, text: &str) -> Result<String, Status> {
    let request = Request::new(text.to_owned());
    ready(client).await.unary(request, path(method), Text).await.map(Response::into_inner)
}

/// One message, answered by many.
async fn count(client: &mut Grpc<Channel>, text: &str) -> Result<Streaming<String>, Status> {
    let request = Request::new(text.to_owned());
    let call = ready(client).await.server_streaming(request, path("Count"), Text);
    call.await.map(Response::into_inner)
}

/// Many messages, answered by one.
async fn join(client: &mut Grpc<Channel>, words: &[&str]) -> Result<String, Status> {
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    let request = Request::new(stream::iter(words));
    let call = ready(client).await.client_streaming(request, path("Join"), Text);
    call.await.map(Response::into_inner)
}

/// Many messages, each answered.
async fn echo(
    client: &mut Grpc<Channel>,
    words: impl Stream<Item = String> + Send + 'static,
) -> Result<Streaming<String>, Status> {
    let call = ready(client).await.streaming(Request::new(words), path("Echo"), Text);
    call.await.map(Response::into_inner)
}

#[test]
fn calls_of_every_kind() {
    let world = World::new(rules(1, &[http(&["POST /x.Greeter/(Say|Count|Join|Echo)"])]));
    let (servers, clients) = (runtime(&world.server), runtime(&world.client));
    let asked = serve(&servers);
    wait_for_server(&world);
    for server in [SERVER4, SERVER6] {
        let mut client = client(&clients, server);
        clients.block_on(async {
            assert_eq!(say(&mut client, "Say", "world").await.unwrap(), "hello world");
            let missing = say(&mut client, "Say", "nobody").await.unwrap_err();
            assert_eq!((missing.code(), missing.message()), (Code::NotFound, "nobody is there"));
            let long = "x".repeat(1 << 20);
            assert_eq!(say(&mut client, "Say", &long).await.unwrap().len(), long.len() + 6);

            let numbers = count(&mut client, "1000").await.unwrap();
            let numbers: Vec<_> = numbers.map(Result::unwrap).collect().await;
            assert!(numbers.iter().map(|n| n.parse::<u32>().unwrap()).eq(0..1000));

            assert_eq!(join(&mut client, &["a", "b", "c"]).await.unwrap(), "abc");

            // Each message comes back before the next is sent.
            let (mut send, words) = mpsc::channel(1);
            let mut echo = echo(&mut client, words).await.unwrap();
            for n in 0..100 {
                send.try_send(n.to_string()).unwrap();
                assert_eq!(echo.next().await.unwrap().unwrap(), n.to_string());
            }
            drop(send);
            assert!(echo.next().await.is_none());
        });
    }
    let asked = asked.lock().unwrap();
    assert_eq!(asked.len(), 2 * 6, "{asked:?}");
}

#[test]
fn denied_calls_of_every_kind() {
    let world = World::new(rules(1, &[http(&["POST /x.Greeter/Say"])]));
    let (servers, clients) = (runtime(&world.server), runtime(&world.client));
    let asked = serve(&servers);
    wait_for_server(&world);
    for server in [SERVER4, SERVER6] {
        let mut client = client(&clients, server);
        let denied = |status: Status| {
            let seen = (status.code(), status.message());
            assert_eq!(seen, (Code::PermissionDenied, "Access denied\r\n"));
        };
        clients.block_on(async {
            denied(say(&mut client, "Shout", "world").await.unwrap_err());
            denied(say(&mut client, "say", "world").await.unwrap_err());
            denied(count(&mut client, "5").await.unwrap_err());
            denied(join(&mut client, &["a"]).await.unwrap_err());
            // A stream that the client leaves open.
            denied(echo(&mut client, stream::pending()).await.unwrap_err());
            // The connection is as good as before.
            assert_eq!(say(&mut client, "Say", "world").await.unwrap(), "hello world");
        });
    }
    assert_eq!(*asked.lock().unwrap(), ["/x.Greeter/Say"; 2]);
    let L7::Http(told) = world.agent.record(|record| !record.allowed).l7 else { panic!() };
    assert_eq!((told.status, told.grpc_status), (Some(200), Some(7)), "what the client got");
}

#[test]
fn an_open_call_ends_with_the_permission() {
    let world = World::new(rules(1, &[http(&["POST /x.Greeter/(Say|Echo)"])]));
    let (servers, clients) = (runtime(&world.server), runtime(&world.client));
    let asked = serve(&servers);
    wait_for_server(&world);
    let mut client = client(&clients, SERVER4);
    clients.block_on(async {
        let (mut send, words) = mpsc::channel(1);
        let mut open = echo(&mut client, words).await.unwrap();
        send.try_send("first".to_owned()).unwrap();
        assert_eq!(open.next().await.unwrap().unwrap(), "first");
        let begun = Instant::now();
        world.agent.put(rules(2, &[http(&["POST /x.Greeter/Say"])]));
        let end = open.next().await.unwrap().unwrap_err();
        assert_eq!(end.code(), Code::Cancelled, "{end:?}");
        assert!(begun.elapsed() < Duration::from_secs(1));
        assert_eq!(say(&mut client, "Say", "world").await.unwrap(), "hello world");
        let again = echo(&mut client, stream::pending()).await;
        assert_eq!(again.unwrap_err().code(), Code::PermissionDenied);
    });
    assert_eq!(*asked.lock().unwrap(), ["/x.Greeter/Echo", "/x.Greeter/Say"]);
    let is_cut = |l7: &L7| matches!(l7, L7::Http(http) if http.error.is_some());
    let cut = world.agent.record(|record| is_cut(&record.l7));
    let L7::Http(told) = cut.l7 else { panic!() };
    assert!(!cut.allowed && told.url.ends_with("/x.Greeter/Echo"), "{told:?}");
    assert!(told.error.unwrap().starts_with("cut by a change of policy"));
}

/// The server's own thread opens its port in its own time.
fn wait_for_server(world: &World) {
    let begun = Instant::now();
    let listens =
        || world.server.run(|| std::net::TcpStream::connect((SERVER4, world::PORT)).is_ok());
    while !listens() {
        assert!(begun.elapsed() < world::WAIT, "the server does not listen");
        thread::yield_now();
    }
}
