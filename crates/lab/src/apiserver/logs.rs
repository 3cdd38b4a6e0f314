//! `pods/log`.

use bytes::Bytes;
use futures::StreamExt as _;
use serde_json::Value;
use tokio::sync::mpsc;

use super::error::ApiError;
use super::http::Call;
use super::reply::{self, Reply};
use crate::runtime::{LogRequest, RuntimeError};

pub(super) async fn serve(call: Call) -> Result<Reply, ApiError> {
    let pod = call.api.store.get(&call.key()).ok_or_else(|| call.not_found())?;
    let container = container(&pod, call.query.get("container"))?;
    let since = match (call.query.number("sinceSeconds")?, call.query.get("sinceTime")) {
        (Some(seconds), _) => {
            let seconds = i64::try_from(seconds).unwrap_or(i64::MAX / 2);
            Some(jiff::Timestamp::now() - jiff::SignedDuration::from_secs(seconds))
        }
        (None, Some(text)) => Some(text.parse().map_err(|_| {
            ApiError::bad_request(format!("sinceTime: {text:?} is not an RFC 3339 time"))
        })?),
        (None, None) => None,
    };
    let request = LogRequest {
        namespace: call.namespace().to_owned(),
        pod: call.target.name.clone().unwrap_or_default(),
        container: Some(container),
        follow: call.query.flag("follow"),
        tail_lines: call.query.number("tailLines")?,
        previous: call.query.flag("previous"),
        timestamps: call.query.flag("timestamps"),
        since,
    };
    let mut limit = call.query.number("limitBytes")?.and_then(|n| usize::try_from(n).ok());
    let mut lines = call.api.runtime.logs(request).await.map_err(from_runtime)?;
    let (sender, chunks) = mpsc::channel::<Bytes>(16);
    tokio::spawn(async move {
        loop {
            let chunk = tokio::select! {
                chunk = lines.next() => chunk,
                () = sender.closed() => return,
            };
            let Some(mut chunk) = chunk else { return };
            if let Some(left) = &mut limit {
                chunk.truncate(*left);
                *left -= chunk.len();
            }
            if sender.send(chunk).await.is_err() || limit == Some(0) {
                return;
            }
        }
    });
    Ok(reply::stream("text/plain", chunks, call.api.stop.clone()))
}

/// The container that is meant: the only one, or the one that is named.
pub(super) fn container(pod: &Value, asked: Option<&str>) -> Result<String, ApiError> {
    let name = pod["metadata"]["name"].as_str().unwrap_or("");
    let names: Vec<&str> = ["containers", "initContainers", "ephemeralContainers"]
        .iter()
        .flat_map(|field| pod["spec"][*field].as_array().into_iter().flatten())
        .filter_map(|container| container["name"].as_str())
        .collect();
    match asked {
        Some(asked) if names.contains(&asked) => Ok(asked.to_owned()),
        Some(asked) => {
            Err(ApiError::bad_request(format!("container {asked} is not valid for pod {name}")))
        }
        None if names.len() == 1 => Ok(names[0].to_owned()),
        None => Err(ApiError::bad_request(format!(
            "a container name must be specified for pod {name}, choose one of: [{}]",
            names.join(" ")
        ))),
    }
}

pub(super) fn from_runtime(error: RuntimeError) -> ApiError {
    match &error {
        RuntimeError::NotFound(_) | RuntimeError::BadRequest(_) => {
            ApiError::bad_request(error.to_string())
        }
        RuntimeError::CannotStart { .. } | RuntimeError::Internal(_) => ApiError::internal(error),
    }
}
