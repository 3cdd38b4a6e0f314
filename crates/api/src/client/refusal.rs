//! A server that serves nobody: it is away, does not know who asks, or has too much to do.

use std::{error::Error, iter, sync::Arc, time::Duration};

use http::{HeaderMap, Request, Response, StatusCode, header::RETRY_AFTER};
use kube::{Client, client::Body, core::Status, runtime::watcher};
use tower::{BoxError, service_fn};

/// Who asks for more patience than this is asked before. It is more than an API server asks for.
const LONGEST: Duration = Duration::from_secs(60);

/// Whoever reads this in a log is to know where, why and what to do.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("the API server at {address} cannot be reached: {cause}; {advice}")]
    Unreachable { address: String, cause: String, advice: String },
    #[error(
        "the API server at {address} does not accept {credentials} (401 Unauthorized): look why \
         nobody renewed it"
    )]
    Unauthorized { address: String, credentials: String },
    #[error(
        "the API server at {address} has too much to do ({status}: {words}); it is asked less \
         often meanwhile"
    )]
    Busy { address: String, status: StatusCode, words: String, after: Duration },
}

impl Refusal {
    pub(super) fn of<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        iter::successors(Some(error), |&error| error.source())
            .find_map(|error| error.downcast_ref())
    }
}

/// Whether the server serves nobody now, which is no fault of what it was asked.
#[must_use]
pub fn is_refusal(error: &(dyn Error + 'static)) -> bool {
    Refusal::of(error).is_some()
}

/// Whether the server says no to what it was asked, itself or by a webhook, and will say so again
/// until somebody mends that. What is not there yet, was changed by another or is too old is not
/// meant, nor a server that cannot do its part now, as when its store does not answer.
pub(super) fn is_denial(error: &(dyn Error + 'static)) -> bool {
    let status = iter::successors(Some(error), |&error| error.source()).find_map(status);
    status.is_some_and(|status| match status.code {
        404 | 408..=410 => false,
        400..500 => true,
        // Webhooks that fail (`NewInternalError` in k8s.io/apimachinery); the store has no reason.
        500 => status.reason == "InternalError",
        _ => false,
    })
}

fn status<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Status> {
    if let Some(kube::Error::Api(status)) = error.downcast_ref() {
        return Some(status);
    }
    match error.downcast_ref() {
        Some(watcher::Error::WatchError(status)) => Some(status),
        _ => None,
    }
}

/// How long the server wants to be left alone.
#[must_use]
pub fn retry_after(error: &(dyn Error + 'static)) -> Duration {
    match Refusal::of(error) {
        Some(Refusal::Busy { after, .. }) => *after,
        _ => Duration::ZERO,
    }
}

/// The same client, whose errors tell refusals from answers. `credentials` are how the server is to
/// know who asks.
pub(super) fn named(client: Client, address: String, credentials: String) -> Client {
    let namespace = client.default_namespace().to_owned();
    let server = Arc::new(Server { address, credentials });
    let service = service_fn(move |request: Request<Body>| {
        let (client, server) = (client.clone(), Arc::clone(&server));
        async move {
            let answer = client.send(request).await?;
            server.judge(answer).await.map_err(BoxError::from)
        }
    });
    Client::new(service, namespace)
}

struct Server {
    address: String,
    credentials: String,
}

impl Server {
    async fn judge(&self, answer: Response<Body>) -> Result<Response<Body>, Refusal> {
        let (address, status) = (self.address.clone(), answer.status());
        let after = patience(status, answer.headers());
        if status != StatusCode::UNAUTHORIZED && after.is_none() {
            return Ok(answer);
        }
        let words = words(answer).await;
        Err(match after {
            Some(after) => Refusal::Busy { address, status, words, after },
            None => Refusal::Unauthorized { address, credentials: self.credentials.clone() },
        })
    }
}

/// How long a server that has too much to do wants to be left alone. Other failures than 429 are
/// about what was asked, unless the server says that the same is to be asked again.
fn patience(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let after = seconds.map(|seconds| Duration::from_secs(seconds).min(LONGEST));
    match status {
        StatusCode::TOO_MANY_REQUESTS => Some(after.unwrap_or_default()),
        _ if status.is_server_error() => after,
        _ => None,
    }
}

/// What the server says. An answer that is not read to its end costs the connection.
async fn words(answer: Response<Body>) -> String {
    let text = answer.into_body().collect_bytes().await.unwrap_or_default();
    // What limits requests answers with plain text.
    let status = serde_json::from_slice(&text).map(|status: Status| status.message);
    status.unwrap_or_else(|_| String::from_utf8_lossy(&text).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_asks_for_patience_with_429_and_where_it_says_for_how_long() {
        let patience = |status: u16, after: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.extend(after.map(|after| (RETRY_AFTER, after.parse().unwrap())));
            super::patience(StatusCode::from_u16(status).unwrap(), &headers)
        };
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(patience(429, Some("7")), seconds(7));
        assert_eq!(patience(429, None), seconds(0));
        assert_eq!(patience(429, Some("Wed, 21 Oct 2026 07:28:00 GMT")), seconds(0));
        assert_eq!(patience(429, Some("86400")), Some(LONGEST));
        assert_eq!(patience(503, Some("2")), seconds(2));
        // As of any error: what is asked may be wrong.
        assert_eq!(patience(503, None), None);
        assert_eq!(patience(500, None), None);
        // The server says so of a name that it made up, and that is taken.
        assert_eq!(patience(409, Some("1")), None);
        assert_eq!(patience(200, Some("1")), None);
    }
}
