//! Finding the agents of this machine and asking them.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use palisade_api::admin::{self, Client, Request, Response};

use crate::exit::Failure;

/// Where the lab keeps the run directories of its nodes.
const LAB_NODES: &str = "/run/palisade/lab/nodes";
/// The run directory of an agent outside the lab.
const RUN_DIR: &str = "/run/palisade";
/// An agent that takes longer than this for an answer counts as not answering.
const TIMEOUT: Duration = Duration::from_secs(5);

/// An agent's socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Agent {
    /// Name of the node where the directory tells it, else the socket's path.
    pub(crate) name: String,
    socket: PathBuf,
}

impl Agent {
    fn at(socket: PathBuf) -> Self {
        let node = socket.strip_prefix(LAB_NODES).ok().and_then(Path::parent);
        let name = node.unwrap_or(&socket).display().to_string();
        Self { name, socket }
    }

    /// Connects; answers are awaited for a bounded time.
    pub(crate) fn connect(&self) -> Result<Client> {
        let client = Client::connect(&self.socket)
            .with_context(|| format!("agent {}: {}", self.name, self.socket.display()))?;
        client.set_timeout(Some(TIMEOUT))?;
        Ok(client)
    }

    /// Asks once.
    pub(crate) fn ask(&self, request: &Request) -> Result<Response> {
        let answer = self
            .connect()?
            .request(request)
            .with_context(|| format!("agent {} did not answer", self.name))?;
        match answer {
            Response::Error(message) | Response::Elsewhere { why: message, .. } => {
                bail!("agent {}: {message}", self.name)
            }
            answer => Ok(answer),
        }
    }
}

/// The sockets given, else those of the lab's nodes, else the one of this machine's agent.
pub(crate) fn discover(given: &[PathBuf]) -> Vec<Agent> {
    if !given.is_empty() {
        return given.iter().cloned().map(Agent::at).collect();
    }
    let lab = lab_sockets(Path::new(LAB_NODES));
    if !lab.is_empty() {
        return lab.into_iter().map(Agent::at).collect();
    }
    let own = Path::new(RUN_DIR).join(admin::SOCKET);
    own.exists().then(|| Agent::at(own)).into_iter().collect()
}

fn lab_sockets(nodes: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(nodes) else { return Vec::new() };
    let mut sockets: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path().join(admin::SOCKET))
        .filter(|socket| socket.exists())
        .collect();
    // node2 before node10
    sockets.sort_by_key(|socket| (socket.as_os_str().len(), socket.clone()));
    sockets
}

/// As [`discover`], but at least one.
pub(crate) fn require(given: &[PathBuf]) -> Result<Vec<Agent>> {
    let agents = discover(given);
    if !agents.is_empty() {
        return Ok(agents);
    }
    Err(Failure::unreachable(
        format!("no agent found: no socket in {LAB_NODES}/*/ and none at {RUN_DIR}/admin.sock"),
        "Start a cluster on this machine with:  palisade lab up\n\
         or name an agent's socket with:       --socket PATH\n\
         or ask in a cluster's agent:          kubectl -n kube-system exec ds/palisade -- /palisade …",
    )
    .into())
}

/// Asks every agent; fails where none answers, and warns of those that do not.
pub(crate) fn ask_all(agents: &[Agent], request: &Request) -> Result<Vec<(Agent, Response)>> {
    let mut answers = Vec::new();
    let mut errors = Vec::new();
    for agent in agents {
        match agent.ask(request) {
            Ok(answer) => answers.push((agent.clone(), answer)),
            Err(error) => errors.push(format!("{error:#}")),
        }
    }
    if answers.is_empty() {
        return Err(Failure::unreachable(errors.join("\n"), "See:  palisade status").into());
    }
    for error in errors {
        eprintln!("warning: {error}");
    }
    Ok(answers)
}

/// Asks one agent after the other until one knows what was asked about; that another node's does, if
/// one of them says so.
pub(crate) fn ask_until_known(agents: &[Agent], request: &Request) -> Result<Response> {
    let mut elsewhere = None;
    let mut answered = None;
    let mut silent = None;
    for agent in agents {
        match agent.connect().and_then(|mut client| Ok(client.request(request)?)) {
            Ok(Response::Error(message)) => answered = Some(message),
            Ok(other @ Response::Elsewhere { .. }) => elsewhere = Some(other),
            Ok(answer) => return Ok(answer),
            Err(error) => silent = Some(format!("{error:#}")),
        }
    }
    if let Some(elsewhere) = elsewhere {
        return Ok(elsewhere);
    }
    match (answered, silent) {
        (Some(message), _) => Err(Failure::not_found(message).into()),
        (None, silent) => {
            Err(Failure::unreachable(silent.unwrap_or_default(), "See:  palisade status").into())
        }
    }
}

/// The agent answered something else than what was asked: versions that do not fit.
pub(crate) fn mismatch(agent: &str) -> anyhow::Error {
    anyhow::anyhow!(
        "agent {agent} gave an answer of another kind; is it of the same version as this command?"
    )
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        os::unix::net::UnixListener,
        thread,
    };

    use super::*;

    /// An agent that says this to whoever asks once.
    fn agent(name: &str, answer: &Response) -> Agent {
        let socket = format!("palisade-agents-{}-{name}.sock", std::process::id());
        let socket = std::env::temp_dir().join(socket);
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let line = serde_json::to_string(answer).unwrap() + "\n";
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut String::new()).unwrap();
            stream.write_all(line.as_bytes()).unwrap();
        });
        Agent { name: name.to_owned(), socket }
    }

    #[test]
    fn who_knows_is_asked_whatever_the_others_say() {
        let elsewhere = Response::Elsewhere { node: "node2".into(), why: "names".into() };
        let unknown = Response::Error("no such pod".into());
        let known = Response::Tables(Vec::new());
        let agents = [agent("a", &elsewhere), agent("b", &unknown), agent("c", &known)];
        assert_eq!(ask_until_known(&agents, &Request::Status).unwrap(), known);
        let agents = [agent("d", &elsewhere), agent("e", &unknown)];
        assert_eq!(ask_until_known(&agents, &Request::Status).unwrap(), elsewhere);
        let agents = [agent("f", &unknown)];
        let error = ask_until_known(&agents, &Request::Status).unwrap_err();
        assert_eq!(error.to_string(), "no such pod");
    }

    #[test]
    fn a_lab_agent_is_called_by_its_node() {
        let agent = Agent::at(PathBuf::from("/run/palisade/lab/nodes/node2/admin.sock"));
        assert_eq!(agent.name, "node2");
    }

    #[test]
    fn another_agent_is_called_by_its_socket() {
        assert_eq!(Agent::at(PathBuf::from("/tmp/a.sock")).name, "/tmp/a.sock");
    }
}
