//! The Star Wars walk-through's server.

use std::process::ExitCode;

use hyper::{Method, StatusCode};

use super::http::{Answer, serve};

const PANIC: &str = "Panic: deathstar exploded

goroutine 1 [running]:
main.HandleGarbage(0x2080c3f50, 0x2, 0x4, 0x425c0, 0x5, 0xa)
        /code/src/github.com/empire/deathstar/
        temp/main.go:9 +0x64
main.main()
        /code/src/github.com/empire/deathstar/
        temp/main.go:5 +0x85
";

/// What a panicking Go program exits with.
const PANIC_EXIT: i32 = 2;

pub(super) fn run(arguments: &[String]) -> anyhow::Result<ExitCode> {
    let port = match arguments {
        [flag, port] if flag == "--port" => port.parse()?,
        _ => 80,
    };
    let description = description(&super::hostname());
    super::runtime()?.block_on(serve(port, move |request, _| {
        answer(request.method(), request.uri().path(), &description)
    }))?;
    Ok(ExitCode::SUCCESS)
}

fn answer(method: &Method, path: &str, description: &str) -> Answer {
    let path = path.trim_end_matches('/');
    match (method.as_str(), path) {
        ("GET" | "HEAD", "/v1") => {
            Answer { content_type: "application/json", ..Answer::text(description) }
        }
        ("GET", "/v1/healthz") => Answer::text("OK\n"),
        ("POST", "/v1/request-landing") => Answer::text("Ship landed\n"),
        ("GET" | "PUT", "/v1/cargobay") => Answer::text("Cargo bay open\n"),
        ("GET", "/v1/hyper-matter-reactor/status") => Answer::text("Reactor stable\n"),
        ("PUT", "/v1/exhaust-port") => {
            eprint!("{PANIC}");
            Answer { exit: Some(PANIC_EXIT), ..Answer::text(PANIC) }
        }
        (
            _,
            "/v1" | "/v1/healthz" | "/v1/request-landing" | "/v1/cargobay" | "/v1/exhaust-port",
        ) => Answer::text(format!("method {method} is not allowed, but {path} has others\n"))
            .status(StatusCode::METHOD_NOT_ALLOWED),
        _ => Answer::text(format!("path {path} was not found\n")).status(StatusCode::NOT_FOUND),
    }
}

fn description(hostname: &str) -> String {
    let value = serde_json::json!({
        "name": "Death Star",
        "hostname": hostname,
        "model": "DS-1 Orbital Battle Station",
        "manufacturer": "Imperial Department of Military Research, Sienar Fleet Systems",
        "cost_in_credits": "1000000000000",
        "length": "120000",
        "crew": "342953",
        "passengers": "843342",
        "cargo_capacity": "1000000000000",
        "hyperdrive_rating": "4.0",
        "starship_class": "Deep Space Mobile Battlestation",
        "api": [
            "GET   /v1",
            "GET   /v1/healthz",
            "POST  /v1/request-landing",
            "PUT   /v1/cargobay",
            "GET   /v1/hyper-matter-reactor/status",
            "PUT   /v1/exhaust-port"
        ]
    });
    format!("{value:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_as_the_walk_through_says() {
        let landing = answer(&Method::POST, "/v1/request-landing", "");
        assert_eq!((landing.body.as_str(), landing.exit), ("Ship landed\n", None));
        let exploded = answer(&Method::PUT, "/v1/exhaust-port", "");
        assert!(exploded.body.starts_with("Panic: deathstar exploded"));
        assert_eq!(exploded.exit, Some(2));
        assert_eq!(answer(&Method::GET, "/v1/exhaust-port", "").status, 405);
        assert_eq!(answer(&Method::GET, "/elsewhere", "").status, 404);
        assert!(answer(&Method::GET, "/v1/", "x").body.contains('x'));
    }
}
