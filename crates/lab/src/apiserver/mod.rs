//! An embedded Kubernetes API server: one generic, schema-driven handler for every kind.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use anyhow::Context as _;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::registry::Registry;
use self::store::{Key, Store};
use crate::runtime::PodRuntime;

mod body;
mod builtin;
mod crd;
mod crud;
mod defaults;
mod discovery;
pub mod error;
mod events;
mod exec;
mod fields;
mod http;
mod list;
mod logs;
mod meta;
mod negotiate;
mod openapi;
mod patch;
mod portforward;
mod protobuf;
pub mod registry;
mod reply;
mod request;
mod reviews;
mod scale;
mod schema;
mod selector;
mod services;
pub mod store;
mod table;
mod tls;
mod validate;
mod watch;
mod websocket;

const CRDS: &str = "apiextensions.k8s.io/customresourcedefinitions";

/// What an API server needs to know.
pub struct ApiServerConfig {
    /// Database file; without one, everything is forgotten with the process.
    pub data: Option<PathBuf>,
    /// Names and addresses, besides the usual ones, by which clients reach the server.
    pub certificate_names: Vec<String>,
    /// Custom resources that exist from the start.
    pub crds: Vec<CustomResourceDefinition>,
    /// Who runs pods.
    pub runtime: Arc<dyn PodRuntime>,
}

/// The server.
#[derive(Clone)]
pub struct ApiServer {
    api: Arc<Api>,
    tls: Arc<rustls::ServerConfig>,
}

/// What all requests share.
struct Api {
    store: Store,
    registry: RwLock<Arc<Registry>>,
    runtime: Arc<dyn PodRuntime>,
    material: tls::Material,
    stop: CancellationToken,
    pages: list::Pages,
    tokens: Mutex<Vec<(String, jiff::Timestamp)>>,
}

impl ApiServer {
    /// Opens the store, makes (or reads back) certificates, and installs the custom resources.
    pub fn new(config: ApiServerConfig) -> anyhow::Result<Self> {
        let store = match &config.data {
            None => Store::in_memory(),
            Some(path) => Store::open(path)
                .with_context(|| format!("cannot open the cluster's data in {}", path.display()))?,
        };
        let mut names = tls::standard_names();
        names.extend(config.certificate_names);
        let material = material(&store, &names)?;
        let api = Arc::new(Api {
            store,
            registry: RwLock::new(Arc::new(Registry::new([]))),
            runtime: config.runtime,
            material,
            stop: CancellationToken::new(),
            pages: list::Pages::default(),
            tokens: Mutex::new(Vec::new()),
        });
        for definition in config.crds {
            api.install(serde_json::to_value(definition)?)?;
        }
        api.reload_registry();
        let tls = Arc::new(api.material.server_config()?);
        Ok(Self { api, tls })
    }

    /// A kubeconfig for the administrator, certificate embedded.
    pub fn kubeconfig(&self, server_url: &str) -> String {
        self.api.material.kubeconfig(server_url)
    }

    /// Certificate of the lab's authority, in PEM.
    pub fn ca(&self) -> &str {
        self.api.material.ca()
    }

    /// Bearer token of the administrator.
    pub fn token(&self) -> &str {
        &self.api.material.token
    }

    /// Serves a listening socket (which may belong to another network namespace) until shutdown.
    pub fn serve(&self, listener: TcpListener) -> JoinHandle<anyhow::Result<()>> {
        let server = self.clone();
        tokio::spawn(async move {
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            http::accept(server.api, server.tls, listener).await;
            Ok(())
        })
    }

    /// Ends all connections and watches.
    pub fn shutdown(&self) {
        self.api.stop.cancel();
    }
}

fn material(store: &Store, names: &[String]) -> anyhow::Result<tls::Material> {
    if let Some(bytes) = store.meta("tls")? {
        let kept: tls::Material = serde_json::from_slice(&bytes)?;
        if kept.covers(names) {
            return Ok(kept);
        }
    }
    let fresh = tls::Material::generate(names)?;
    store.set_meta("tls", &serde_json::to_vec(&fresh)?)?;
    Ok(fresh)
}

impl Api {
    fn registry(&self) -> Arc<Registry> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tokens of service accounts and when they end.
    fn tokens(&self) -> MutexGuard<'_, Vec<(String, jiff::Timestamp)>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the definitions again after one has changed.
    fn reload_registry(&self) {
        let definitions = self.store.list(CRDS, None).objects;
        let custom = definitions.iter().flat_map(|definition| crd::resources(definition));
        let fresh = Arc::new(Registry::new(custom));
        *self.registry.write().unwrap_or_else(PoisonError::into_inner) = fresh;
    }

    /// Creates a custom resource definition, or brings it up to date.
    fn install(&self, mut definition: Value) -> anyhow::Result<()> {
        definition["apiVersion"] = "apiextensions.k8s.io/v1".into();
        definition["kind"] = "CustomResourceDefinition".into();
        let name = meta::text(&definition, "name").to_owned();
        let key = Key::new(CRDS, "", &name);
        let uid = meta::uid()?;
        self.store.transact(|transaction| {
            defaults::apply(CRDS, &mut definition);
            let old = transaction.get(&key);
            if old.as_ref().is_some_and(|old| old["spec"] == definition["spec"]) {
                return Ok(());
            }
            let metadata = meta::metadata(&mut definition);
            match old {
                Some(old) => *metadata = old["metadata"].as_object().cloned().unwrap_or_default(),
                None => {
                    metadata.insert("uid".into(), uid.into());
                    metadata.insert("creationTimestamp".into(), meta::now().into());
                    metadata.insert("generation".into(), 1.into());
                }
            }
            definition["status"] = crd::status(&definition);
            transaction.put(key, definition);
            Ok(())
        })?;
        Ok(())
    }
}
