//! nginx and wrk, where both are installed: a server and a client that people use, and that do for a
//! request what such programs do.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use super::{
    http::{BODY, Done, SLICE},
    program::{Program, find},
};

const CLIENT: &str = "wrk";

/// Starts nginx in a network namespace at both addresses; none where it or its client is not on the
/// search path. It keeps its files in the directory.
pub(super) fn start(
    netns: &Path,
    directory: &Path,
    at: [SocketAddr; 2],
) -> Result<Option<Program>> {
    let (Some(program), Some(_)) = (find("nginx"), find(CLIENT)) else { return Ok(None) };
    let (page, file) = (directory.join("www/public/index.html"), directory.join("nginx.conf"));
    std::fs::create_dir_all(directory.join("www/public"))?;
    std::fs::write(page, BODY)?;
    std::fs::write(&file, config(at))?;
    let mut command = Command::new(program);
    command.arg("-p").arg(directory).arg("-c").arg(file);
    Program::start(netns, command, at[0]).map(Some)
}

/// One process, which answers with a small file and notes nothing.
fn config(at: [SocketAddr; 2]) -> String {
    let [one, other] = at;
    format!(
        "daemon off;
master_process off;
pid nginx.pid;
error_log /dev/null;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    sendfile on;
    open_file_cache max=16;
    root www;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    server {{ listen {one}; listen {other}; }}
}}
"
    )
}

/// Asks `to` for a while over so many connections; runs where its thread is.
pub(super) fn ask(to: SocketAddr, connections: usize) -> Result<Done> {
    let output = Command::new(CLIENT)
        .args(["--threads", "1", "--latency"])
        .args(["--connections", &connections.to_string()])
        .args(["--duration", &format!("{}s", SLICE.as_secs())])
        .arg(format!("http://{to}/public/index.html"))
        .stdin(Stdio::null())
        .output()
        .context(CLIENT)?;
    let told = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{CLIENT}: {}", String::from_utf8_lossy(&output.stderr));
    read(&told).with_context(|| format!("{CLIENT} said:\n{told}"))
}

/// What wrk tells at its end. An answer that is not 200, or none, is an error.
fn read(told: &str) -> Result<Done> {
    let failed = ["Socket errors", "Non-2xx"].iter().any(|failure| told.contains(failure));
    ensure!(!failed, "not every request had its answer");
    let lines = || told.lines().map(str::trim);
    let requests = lines().find_map(|line| line.split_once(" requests in "));
    let (requests, _) = requests.context("no number of requests")?;
    let median = lines().find_map(|line| line.strip_prefix("50%"));
    let median_latency = duration(median.context("no median latency")?.trim())?;
    Ok(Done { requests: requests.parse()?, median_latency })
}

/// `1.50us`, `1.50ms` or `1.50s`.
fn duration(text: &str) -> Result<Duration> {
    let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    let found = units.iter().find_map(|(unit, size)| Some((text.strip_suffix(unit)?, size)));
    let (number, size) = found.with_context(|| format!("{text:?} has no unit"))?;
    Ok(Duration::try_from_secs_f64(number.parse::<f64>()? * size)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLD: &str = "Running 1s test @ http://10.1.0.3:7780/public/index.html
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   498.28us    1.27ms  28.07ms   97.91%
    Req/Sec    42.51k     5.10k   50.98k    70.00%
  Latency Distribution
     50%  331.00us
     99%    5.79ms
  42311 requests in 1.00s, 6.13MB read
Requests/sec:  42268.51
Transfer/sec:      6.13MB
";

    #[test]
    fn what_wrk_tells_is_understood() {
        let done = read(TOLD).unwrap();
        assert_eq!((done.requests, done.median_latency), (42311, Duration::from_micros(331)));
        let slow = read(&TOLD.replace("331.00us", "1.50ms")).unwrap();
        assert_eq!(slow.median_latency, Duration::from_micros(1500));
    }

    #[test]
    fn requests_that_failed_are_no_measure() {
        let sign = "Requests/sec";
        for failure in ["Socket errors: connect 0, read 1", "Non-2xx or 3xx responses: 42311"] {
            let told = TOLD.replace(sign, &format!("  {failure}\n{sign}"));
            assert!(read(&told).is_err(), "{failure}");
        }
        assert!(read("").is_err());
    }
}
