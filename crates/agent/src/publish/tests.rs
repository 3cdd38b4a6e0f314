//! What is written when, and what is not.

use std::time::Duration;

use palisade_api::routing::Routing;
use serde_json::Value;
use tokio::time::timeout;

use super::{
    fake::{Answer, Asked, refused, server},
    *,
};

/// `CiliumEndpoint`s by name, and how often somebody wanted to write each.
#[derive(Default)]
struct Written {
    objects: BTreeMap<String, Value>,
    attempts: BTreeMap<String, usize>,
}

/// The publisher, before a server that refuses what it is told to.
struct Bench {
    client: Client,
    written: watch::Receiver<Written>,
    publications: mpsc::UnboundedSender<Publication>,
    attempts: watch::Receiver<Attempts>,
}

impl Bench {
    /// `refuses`: with which status, if it does.
    async fn begin(refuses: impl Fn(&Asked) -> Option<u16> + Send + Sync + 'static) -> Self {
        let (shared, written) = watch::channel(Written::default());
        let client = server(move |asked| {
            let mut answered = None;
            shared.send_modify(|written| {
                *written.attempts.entry(asked.name().to_owned()).or_default() += 1;
                let refusal = refuses(asked).map(refused);
                answered = Some(refusal.unwrap_or_else(|| answer(asked, &mut written.objects)));
            });
            answered.expect("an answer")
        })
        .await;
        let (publications, queue) = mpsc::unbounded_channel();
        let (commands, _) = mpsc::channel(1);
        let (sender, attempts) = watch::channel(Attempts::default());
        tokio::spawn(run(client.clone(), scope("node1"), queue, commands.downgrade(), sender));
        Self { client, written, publications, attempts }
    }

    fn publish(&self, publication: Publication) {
        self.publications.send(publication).expect("a publisher");
    }

    async fn until(&mut self, holds: impl FnMut(&Written) -> bool) {
        within(self.written.wait_for(holds)).await.expect("a server");
    }
}

/// What is awaited comes much sooner, or never.
async fn within<T>(work: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(30), work).await.expect("in time")
}

fn answer(asked: &Asked, objects: &mut BTreeMap<String, Value>) -> Answer {
    let object = match (asked.method.as_str(), objects.get_mut(asked.name())) {
        ("post", _) => {
            let name = asked.body["metadata"]["name"].as_str().expect("a name");
            objects.insert(name.to_owned(), asked.body.clone());
            asked.body.clone()
        }
        ("get", Some(object)) => object.clone(),
        ("patch", Some(object)) => {
            object["status"] = asked.body["status"].clone();
            object.clone()
        }
        ("delete", Some(_)) => objects.remove(asked.name()).expect("an object"),
        (_, None) => return refused(404),
        (method, _) => panic!("{method}"),
    };
    (200, object)
}

fn scope(node: &str) -> Scope {
    Scope { node: node.into(), cluster: "default".into(), routing: Routing::Native }
}

fn endpoint(pod: &str, container: &str) -> Publication {
    Publication::Endpoint(Box::new(EndpointState {
        pod: ObjectName::new("default", pod),
        uid: "u".into(),
        id: 2,
        container_id: container.into(),
        identity: 1000,
        labels: Vec::new(),
        addresses: Vec::new(),
        ports: Vec::new(),
        service_account: String::new(),
        ingress: false,
        egress: false,
    }))
}

#[tokio::test]
async fn what_is_not_taken_is_tried_again_and_keeps_nothing_else_waiting() {
    let mut bench = Bench::begin(|asked| (asked.name() == "a").then_some(403)).await;
    bench.publish(endpoint("a", "1"));
    bench.until(|written| written.attempts.contains_key("a")).await;
    bench.publish(endpoint("b", "1"));
    bench.until(|written| written.objects.contains_key("b")).await;
    bench.until(|written| written.attempts["a"] > 3).await;
    let [a, b] = ["a", "b"].map(|pod| ObjectName::new("default", pod));
    let told = |attempts: &Attempts| {
        let why = attempts.failure(&a);
        why.is_some_and(|why| why.contains("away")) && attempts.failure(&b).is_none()
    };
    within(bench.attempts.wait_for(told)).await.expect("a publisher");
}

#[tokio::test]
async fn one_object_that_a_busy_server_refuses_keeps_no_other_from_being_written() {
    let mut bench = Bench::begin(|asked| (asked.name() == "a").then_some(429)).await;
    bench.publish(endpoint("a", "1"));
    bench.until(|written| written.attempts.contains_key("a")).await;
    bench.publish(endpoint("b", "1"));
    bench.until(|written| written.objects.contains_key("b")).await;
    bench.until(|written| written.attempts["a"] > 1).await;
}

fn gone(pod: &str, container: &str) -> Publication {
    Publication::EndpointGone(ObjectName::new("default", pod), container.into())
}

/// Whose sandbox the object of a pod tells of.
fn container<'a>(written: &'a Written, pod: &str) -> Option<&'a Value> {
    Some(&written.objects.get(pod)?["status"]["external-identifiers"]["container-id"])
}

#[tokio::test]
async fn only_the_endpoint_that_is_gone_takes_its_object_away() {
    let mut bench = Bench::begin(|_| None).await;
    bench.publish(endpoint("web", "old"));
    bench.until(|written| container(written, "web").is_some_and(|it| it == "old")).await;
    // Another sandbox of the pod, which is told of before and after the old one changes again.
    bench.publish(endpoint("web", "new"));
    bench.until(|written| container(written, "web").is_some_and(|it| it == "new")).await;
    bench.publish(endpoint("web", "old"));
    bench.until(|written| container(written, "web").is_some_and(|it| it == "old")).await;
    bench.publish(gone("web", "old"));
    bench.until(|written| container(written, "web").is_some_and(|it| it == "new")).await;
    bench.publish(gone("web", "new"));
    bench.until(|written| written.objects.is_empty()).await;
}

#[tokio::test]
async fn an_object_that_another_node_wrote_stays() {
    let bench = Bench::begin(|_| None).await;
    let pod = ObjectName::new("default", "web");
    let Publication::Endpoint(state) = endpoint("web", "there") else { unreachable!() };
    endpoints::write(&bench.client, &scope("node2"), &state).await.expect("written");
    endpoints::delete(&bench.client, &pod, "here").await.expect("nothing to do");
    assert!(bench.written.borrow().objects.contains_key("web"));
    endpoints::delete(&bench.client, &pod, "there").await.expect("deleted");
    assert!(bench.written.borrow().objects.is_empty());
}
