//! Lists, in pages if the client asks.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use super::crud::serve_object;
use super::error::ApiError;
use super::http::Call;
use super::negotiate::Form;
use super::reply::{self, Reply};
use super::selector::Selector;
use super::{table, tls};

/// Lists that are being read in pages; the oldest is forgotten first.
const KEPT: usize = 64;

/// The rest of lists that are being read in pages, all as of their first page.
#[derive(Default)]
pub(super) struct Pages(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    lists: HashMap<String, Rest>,
    order: VecDeque<String>,
}

#[derive(Clone)]
struct Rest {
    /// What was asked for: a token is of no use for anything else.
    request: String,
    revision: u64,
    objects: Vec<Arc<Value>>,
}

impl Pages {
    fn keep(&self, rest: Rest) -> Result<String, ApiError> {
        let token = tls::random_hex(16).map_err(ApiError::internal)?;
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.lists.insert(token.clone(), rest);
        kept.order.push_back(token.clone());
        if kept.order.len() > KEPT
            && let Some(oldest) = kept.order.pop_front()
        {
            kept.lists.remove(&oldest);
        }
        Ok(token)
    }

    /// A page may be asked for again, so it is not forgotten when it is read.
    fn find(&self, token: &str) -> Option<Rest> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).lists.get(token).cloned()
    }
}

pub(super) fn selector(call: &Call) -> Result<Selector, ApiError> {
    let (labels, fields) = (call.query.get("labelSelector"), call.query.get("fieldSelector"));
    Selector::parse(&call.resource, labels, fields)
}

pub(super) fn serve(call: &Call) -> Result<Reply, ApiError> {
    let limit = call.query.number("limit")?.unwrap_or(0);
    let (revision, mut objects) = match call.query.get("continue").filter(|t| !t.is_empty()) {
        Some(token) => next_page(call, token)?,
        None => {
            let selector = selector(call)?;
            let namespace = call.target.namespace.as_deref();
            let snapshot = call.api.store.list(&call.resource.storage, namespace);
            check_revision(call, snapshot.revision)?;
            let mut objects = snapshot.objects;
            objects.retain(|object| selector.matches(object));
            (snapshot.revision, objects)
        }
    };
    let mut metadata = json!({"resourceVersion": revision.to_string()});
    let limit = usize::try_from(limit).unwrap_or(0);
    if limit > 0 && objects.len() > limit {
        let rest = objects.split_off(limit);
        metadata["remainingItemCount"] = rest.len().into();
        let rest = Rest { request: request(call), revision, objects: rest };
        metadata["continue"] = call.api.pages.keep(rest)?.into();
    }
    let mut served: Vec<Value> =
        objects.iter().map(|object| serve_object(&call.resource, object)).collect();
    let list = match call.accept.form {
        Form::Table => {
            let rows: Vec<&Value> = served.iter().collect();
            table::of(&call.resource, &rows, metadata, call.query.get("includeObject"))
        }
        Form::Partial => json!({
            "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
            "metadata": metadata, "items": served.iter().map(table::partial).collect::<Vec<_>>(),
        }),
        Form::Object => {
            if call.resource.custom.is_none() {
                // The list says once what its items are.
                for object in served.iter_mut().filter_map(Value::as_object_mut) {
                    object.remove("apiVersion");
                    object.remove("kind");
                }
            }
            let mut list = json!({
                "kind": call.resource.list_kind, "apiVersion": call.resource.api_version(),
                "metadata": metadata,
            });
            // Named in the macro they would be copied, all of them.
            list["items"] = served.into();
            list
        }
    };
    Ok(reply::object(200, &list, call.accept.yaml))
}

/// What a list is of, whatever the size of its pages.
fn request(call: &Call) -> String {
    let (labels, fields) = (call.query.get("labelSelector"), call.query.get("fieldSelector"));
    let asked = (&call.resource.storage, &call.target.namespace, labels, fields);
    format!("{asked:?}")
}

fn next_page(call: &Call, token: &str) -> Result<(u64, Vec<Arc<Value>>), ApiError> {
    let rest = call.api.pages.find(token).ok_or_else(expired_page)?;
    if rest.request != request(call) {
        return Err(ApiError::bad_request(
            "continue key is not valid: it belongs to a list of something else; use it with the \
             path and the selectors of the list that gave it",
        ));
    }
    Ok((rest.revision, rest.objects))
}

/// Lists always show the present; older revisions are not kept, newer ones do not exist.
fn check_revision(call: &Call, current: u64) -> Result<(), ApiError> {
    let Some(asked) = call.query.number("resourceVersion")?.filter(|asked| *asked > 0) else {
        return Ok(());
    };
    if asked > current {
        return Err(ApiError::too_new(asked, current));
    }
    if call.query.get("resourceVersionMatch") == Some("Exact") && asked != current {
        return Err(ApiError::expired(asked, current));
    }
    Ok(())
}

fn expired_page() -> ApiError {
    let mut error = ApiError::expired(0, 0);
    error.message = "The provided continue parameter is too old to display a consistent list \
                     result. You can start a new list without the continue parameter."
        .to_owned();
    error
}
