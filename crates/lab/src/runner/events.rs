//! Events about pods, as the kubelet writes them.

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::PostParams;
use kube::{Api, Client, Resource, ResourceExt};

/// Writes events about one pod.
#[derive(Clone)]
pub(crate) struct Recorder {
    client: Client,
    component: &'static str,
    host: Option<String>,
}

impl Recorder {
    /// A recorder for `component`.
    pub(crate) fn new(client: Client, component: &'static str, host: Option<String>) -> Self {
        Self { client, component, host }
    }

    /// Something as it should be.
    pub(crate) async fn normal(&self, pod: &Pod, reason: &str, message: impl Into<String>) {
        self.record(pod, "Normal", reason, message.into()).await;
    }

    /// Something somebody should look at.
    pub(crate) async fn warning(&self, pod: &Pod, reason: &str, message: impl Into<String>) {
        self.record(pod, "Warning", reason, message.into()).await;
    }

    async fn record(&self, pod: &Pod, kind: &str, reason: &str, message: String) {
        let now = jiff::Timestamp::now();
        let namespace = pod.namespace().unwrap_or_default();
        let event = Event {
            metadata: ObjectMeta {
                name: Some(format!("{}.{:x}", pod.name_any(), now.as_nanosecond())),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                ..pod.object_ref(&())
            },
            reason: Some(reason.to_owned()),
            message: Some(message),
            type_: Some(kind.to_owned()),
            count: Some(1),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            source: Some(EventSource {
                component: Some(self.component.to_owned()),
                host: self.host.clone(),
            }),
            reporting_component: Some(self.component.to_owned()),
            ..Event::default()
        };
        // Events are a courtesy: a namespace that is going away takes no more of them.
        let api = Api::<Event>::namespaced(self.client.clone(), &namespace);
        if let Err(error) = api.create(&PostParams::default(), &event).await {
            tracing::debug!("event {reason}: {error}");
        }
    }
}
