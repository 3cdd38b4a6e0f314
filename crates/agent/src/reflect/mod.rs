//! From the API server to intent tables. Objects are parsed at this edge and dropped; what goes
//! on is the model.
//!
//! A watcher lists, then watches; after an outage or a `410 Gone` it lists again, and the new
//! list replaces what was known. Between, what was known stands.

pub(crate) mod identities;
mod namespaces;
mod nodes;
mod pods;
mod policies;
mod secrets;
mod services;

use std::{fmt::Debug, sync::atomic::Ordering::Relaxed, time::Duration};

use futures::TryStreamExt;
use kube::{Api, Client, Resource, runtime::watcher};
use palisade_api::client::{CALM, WATCH_SECONDS, chain, noticing, patient};
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, task::JoinSet, time::timeout};
use tracing::{debug, info, warn};

use crate::{
    engine::Command,
    resources,
    tables::{Change, Intent, Row},
};

/// Follows every kind of object that the agent needs; Secrets in the namespace `secrets` only.
pub fn follow_all(
    client: &Client,
    cluster: &str,
    secrets: String,
    commands: &mpsc::Sender<Command>,
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let source = Source { client: client.clone(), commands: commands.clone(), calm: CALM };
    let from = || source.clone();
    tasks.spawn(follow(from(), Api::all, namespaces::Reflect));
    tasks.spawn(follow(from(), Api::all, pods::Reflect));
    tasks.spawn(follow(from(), Api::all, services::Services));
    tasks.spawn(follow(from(), Api::all, services::Slices));
    tasks.spawn(follow(from(), Api::all, nodes::Nodes));
    let of_secrets = move |client| Api::namespaced(client, &secrets);
    tasks.spawn(follow(from(), of_secrets, secrets::Reflect));
    let of = |resource| move |client| Api::all_with(client, &resource);
    tasks.spawn(follow(from(), of(resources::cilium("CiliumNode")), nodes::CiliumNodes));
    let identities = of(resources::cilium("CiliumIdentity"));
    tasks.spawn(follow(from(), identities, identities::Reflect));
    for kind in crate::tables::POLICY_KINDS {
        let policies = policies::Reflect { kind, cluster: cluster.to_owned() };
        tasks.spawn(follow(from(), of(resources::policy(kind)), policies));
    }
    tasks
}

/// Who is asked, and who hears of the answers.
#[derive(Clone)]
struct Source {
    client: Client,
    commands: mpsc::Sender<Command>,
    /// So long without a failure, and all is well again.
    calm: Duration,
}

/// How objects of a kind become rows.
trait Parse: Send + 'static {
    /// Kind of object.
    ///
    /// Those of `cilium.io` and all policies are read as plain JSON: one malformed object must not
    /// keep the others from being read.
    type Object: Resource + Clone + DeserializeOwned + Debug + Send + 'static;
    /// What they become.
    type Row: Row;

    /// The key of the row that the object becomes.
    fn key(&self, object: &Self::Object) -> <Self::Row as Row>::Key;
    /// The row; none for an object that does not matter here.
    fn parse(&self, object: Self::Object) -> Option<Self::Row>;
    /// The change of the right table.
    fn intent(&self, change: Change<Self::Row>) -> Intent;
}

async fn follow<P: Parse>(source: Source, api: impl FnOnce(Client) -> Api<P::Object>, parse: P) {
    let (client, begun) = noticing(&source.client);
    let api = api(client);
    let config = watcher::Config::default().timeout(WATCH_SECONDS);
    let mut stream = std::pin::pin!(patient(watcher(api, config)));
    let mut listed = Vec::new();
    let mut failing: Option<String> = None;
    loop {
        let calm = if failing.is_some() { source.calm } else { Duration::MAX };
        let change = match timeout(calm, stream.try_next()).await {
            // Nothing was answered: another failure is still to come.
            Err(_) if !begun.load(Relaxed) => continue,
            // A watch that is taken up where it broke off does not say so.
            Err(_) => {
                failing = None;
                info!(table = P::Row::TABLE, "following the API again");
                Change::Recovered
            }
            Ok(Ok(None)) => return,
            Ok(Ok(Some(watcher::Event::Init))) => {
                listed.clear();
                continue;
            }
            Ok(Ok(Some(watcher::Event::InitApply(object)))) => {
                listed.extend(parse.parse(object));
                continue;
            }
            Ok(Ok(Some(watcher::Event::InitDone))) => {
                debug!(table = P::Row::TABLE, rows = listed.len(), "listed");
                if failing.take().is_some() {
                    info!(table = P::Row::TABLE, "following the API again");
                }
                Change::Replace(std::mem::take(&mut listed))
            }
            Ok(Ok(Some(watcher::Event::Apply(object)))) => {
                let key = parse.key(&object);
                parse.parse(object).map_or(Change::Delete(key), Change::Put)
            }
            Ok(Ok(Some(watcher::Event::Delete(object)))) => Change::Delete(parse.key(&object)),
            Ok(Err(error)) => {
                let error = chain(&error);
                if failing.as_ref() != Some(&error) {
                    let table = P::Row::TABLE;
                    warn!(table, error, "cannot follow the API; what is known stands");
                }
                failing = Some(error.clone());
                begun.store(false, Relaxed);
                Change::Failed(error)
            }
        };
        if source.commands.send(Command::Intent(Box::new(parse.intent(change)))).await.is_err() {
            return;
        }
    }
}

/// Name of a namespaced object.
fn object_name<K: Resource>(object: &K) -> crate::tables::ObjectName {
    let meta = object.meta();
    crate::tables::ObjectName::new(
        meta.namespace.clone().unwrap_or_default(),
        meta.name.clone().unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::{Value, json};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        task::JoinHandle,
    };

    use super::*;
    use crate::publish::fake::client_of;

    /// A server, who follows it, and what is told of that.
    async fn world(calm: Duration) -> (TcpListener, JoinHandle<()>, mpsc::Receiver<Command>) {
        let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = server.local_addr().expect("an address");
        let client = client_of(&address.to_string()).await;
        let (commands, queue) = mpsc::channel(64);
        let source = Source { client, commands, calm };
        (server, tokio::spawn(follow(source, Api::all, namespaces::Reflect)), queue)
    }

    /// A server that is away must not be hammered by every agent.
    #[tokio::test]
    async fn a_server_that_fails_is_asked_less_and_less() {
        let (server, following, mut queue) = world(CALM).await;
        let mut asked = Vec::new();
        for _ in 0..6 {
            drop(server.accept().await.expect("a request"));
            asked.push(Instant::now());
            assert!(matches!(queue.recv().await, Some(Command::Intent(_))), "the failure is told");
        }
        following.abort();
        assert!(asked[5] - asked[4] >= Duration::from_millis(400), "{asked:?}");
    }

    /// A server that takes requests and answers none of them is as quiet as one without news.
    #[tokio::test]
    async fn who_never_answers_has_not_recovered() {
        const CALM: Duration = Duration::from_millis(100);
        const LIST: &str = r#"{"kind": "NamespaceList", "apiVersion": "v1",
            "metadata": {"resourceVersion": "1"}, "items": []}"#;
        let (server, following, mut queue) = world(CALM).await;
        let asked = async || server.accept().await.expect("a request").0;
        let answer = async |stream: &mut TcpStream, rest: &str| {
            let answer = format!("HTTP/1.1 200 OK\r\nConnection: close\r\n{rest}");
            stream.write_all(answer.as_bytes()).await.expect("it is heard");
        };
        let mut told = async || match queue.recv().await {
            Some(Command::Intent(intent)) => *intent,
            _ => panic!("nobody follows"),
        };
        let list = format!("Content-Length: {}\r\n\r\n{LIST}", LIST.len());
        answer(&mut asked().await, &list).await;
        assert!(matches!(told().await, Intent::Namespace(Change::Replace(_))));
        drop(asked().await);
        assert!(matches!(told().await, Intent::Namespace(Change::Failed(_))));
        let silent = asked().await;
        let silence = timeout(CALM * 5, told()).await;
        assert!(silence.is_err(), "{silence:?}");
        drop(silent);
        assert!(matches!(told().await, Intent::Namespace(Change::Failed(_))));
        let mut watched = asked().await;
        answer(&mut watched, "Transfer-Encoding: chunked\r\n\r\n").await;
        assert!(matches!(told().await, Intent::Namespace(Change::Recovered)));
        following.abort();
    }

    /// Answers the next request, which asks for what is wanted.
    async fn serve(server: &TcpListener, wanted: &str, status: &str, body: &str) {
        let (mut stream, _) = server.accept().await.expect("a request");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.expect("a head"));
        }
        let head = String::from_utf8(head).expect("text");
        assert!(head.lines().next().is_some_and(|line| line.contains(wanted)), "{head}");
        let answer = format!("HTTP/1.1 {status}\r\nconnection: close\r\n\r\n{body}");
        stream.write_all(answer.as_bytes()).await.expect("an answer");
    }

    fn list(version: &str, names: &[&str], more: Option<&str>) -> (u16, String) {
        let item = |name: &&str| json!({ "metadata": { "name": name } });
        let items: Vec<_> = names.iter().map(item).collect();
        let metadata = json!({ "resourceVersion": version, "continue": more });
        (200, json!({ "metadata": metadata, "items": items }).to_string())
    }

    fn event(kind: &str, object: &Value) -> String {
        json!({ "type": kind, "object": object }).to_string() + "\n"
    }

    fn too_old() -> Value {
        json!({ "kind": "Status", "status": "Failure", "reason": "Expired", "code": 410,
                "message": "too old resource version" })
    }

    /// A server that forgot, or that was taken back to an earlier day: the list is read anew, and
    /// only a whole one counts. What it lacks is gone, and before that nothing is.
    #[tokio::test]
    async fn what_a_new_list_lacks_is_gone_and_half_a_list_is_none() {
        let object = |name: &str, version: &str| {
            json!({ "apiVersion": "v1", "kind": "Namespace",
                    "metadata": { "name": name, "resourceVersion": version } })
        };
        let half = event("DELETED", &object("b", "103"));
        // What is asked for, and the answer.
        let script = [
            ("limit=", list("100", &["a"], Some("rest"))),
            ("continue=rest", (410, too_old().to_string())),
            ("limit=", list("101", &["a", "b"], None)),
            ("resourceVersion=101", (200, event("ADDED", &object("c", "102")) + &half[..40])),
            ("resourceVersion=102", (200, event("ERROR", &too_old()))),
            ("limit=", (500, "{".into())),
            ("limit=", list("7", &["a", "d"], None)),
            ("resourceVersion=7", (200, event("DELETED", &object("d", "8")))),
        ];
        let (server, following, mut queue) = world(CALM).await;
        for (wanted, (status, body)) in script {
            serve(&server, wanted, &format!("{status} x"), &body).await;
        }
        let mut known = Vec::new();
        while known.len() < 4 {
            let Some(Command::Intent(intent)) = queue.recv().await else { panic!("an intent") };
            let Intent::Namespace(change) = *intent else { panic!("{intent:?}") };
            known.push(match change {
                Change::Replace(rows) => {
                    rows.into_iter().map(|row| row.name).collect::<Vec<_>>().join(" ")
                }
                Change::Put(row) => format!("+{}", row.name),
                Change::Delete(name) => format!("-{name}"),
                Change::Failed(_) | Change::Recovered => continue,
            });
        }
        following.abort();
        assert_eq!(known, ["a b", "+c", "a d", "-d"]);
    }
    /// A server that has too much to do may say so between two pages.
    #[tokio::test]
    async fn a_busy_server_is_left_alone_as_long_as_it_asks_for_and_half_a_list_is_none() {
        const BUSY: &str = "429 Too Many Requests\r\nRetry-After: 1";
        let (server, following, mut queue) = world(CALM).await;
        let (_, half) = list("100", &["a"], Some("rest"));
        serve(&server, "limit=", "200 x", &half).await;
        serve(&server, "continue=rest", BUSY, "Try again later.\n").await;
        let begun = Instant::now();
        let (_, whole) = list("101", &["b"], None);
        serve(&server, "limit=", "200 x", &whole).await;
        assert!(begun.elapsed() > Duration::from_secs(1), "{:?}", begun.elapsed());
        let mut told = async || match queue.recv().await {
            Some(Command::Intent(intent)) => *intent,
            _ => panic!("nobody follows"),
        };
        let busy = told().await;
        let Intent::Namespace(Change::Failed(error)) = busy else { panic!("{busy:?}") };
        assert!(error.contains("429 Too Many Requests: Try again later."), "{error}");
        let replaced = told().await;
        let Intent::Namespace(Change::Replace(rows)) = replaced else { panic!("{replaced:?}") };
        assert_eq!(rows.iter().map(|row| row.name.as_str()).collect::<Vec<_>>(), ["b"]);
        following.abort();
    }
}
