//! What is written when, and what is not.

use palisade_api::routing::Routing;
use serde_json::Value;
use tokio::sync::watch;

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
    written: watch::Receiver<Written>,
    publications: mpsc::UnboundedSender<Publication>,
}

impl Bench {
    async fn begin(refuses: impl Fn(&Asked) -> bool + Send + Sync + 'static) -> Self {
        let (shared, written) = watch::channel(Written::default());
        let client = server(move |asked| {
            let mut answered = refused(403);
            shared.send_modify(|written| {
                *written.attempts.entry(asked.name().to_owned()).or_default() += 1;
                if !refuses(asked) {
                    answered = answer(asked, &mut written.objects);
                }
            });
            answered
        })
        .await;
        let (publications, queue) = mpsc::unbounded_channel();
        let scope =
            Scope { node: "node1".into(), cluster: "default".into(), routing: Routing::Native };
        let (commands, _) = mpsc::channel(1);
        tokio::spawn(run(client, scope, queue, commands.downgrade()));
        Self { written, publications }
    }

    fn publish(&self, publication: Publication) {
        self.publications.send(publication).expect("a publisher");
    }

    async fn until(&mut self, holds: impl FnMut(&Written) -> bool) {
        self.written.wait_for(holds).await.expect("a server");
    }
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
    let mut bench = Bench::begin(|asked| asked.name() == "a").await;
    bench.publish(endpoint("a", "1"));
    bench.until(|written| written.attempts.get("a").is_some()).await;
    bench.publish(endpoint("b", "1"));
    bench.until(|written| written.objects.contains_key("b")).await;
    bench.until(|written| written.attempts["a"] > 3).await;
}
