//! The command as shells see it; no cluster is needed.

use std::process::{Command, Output, Stdio};

fn palisade(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_palisade"));
    command.args(arguments).env("PALISADE_SOCKET", "/nonexistent/admin.sock");
    command.env("KUBECONFIG", "/nonexistent/kubeconfig");
    command
}

fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(out), String::from_utf8_lossy(err))
}

const EXPLAIN: [&str; 8] =
    ["policy", "explain", "--from", "192.0.2.1", "--to", "192.0.2.2", "--port", "80"];

#[test]
fn exit_codes_mean_what_the_help_says() {
    let cases: [(&[&str], i32, &str); 16] = [
        (&["version", "--client"], 0, "palisade:"),
        (&["policy", "check", "/nonexistent"], 1, "cannot read /nonexistent"),
        (&["policy", "check", "/dev/null"], 1, "no policy found"),
        (&["nosuch"], 2, "unrecognized subcommand"),
        (&["observe", "--protocol", "nosuch"], 2, "possible values: tcp, udp"),
        (&["observe", "--verdict", "nosuch"], 2, "possible values"),
        (&[&EXPLAIN[..], &["--header", "x: y"]].concat(), 2, "--http <REQUEST>"),
        (
            &[&EXPLAIN[..], &["--http", "GET /", "--header", "x"]].concat(),
            1,
            "--header: write a name, a colon and a value, such as 'X-Role: admin'",
        ),
        (&["status"], 3, "$KUBECONFIG names /nonexistent/kubeconfig, which does not exist"),
        (&["endpoint", "list"], 3, "/nonexistent/admin.sock"),
        // Told before anybody looks for a cluster.
        (
            &["connectivity", "test", "--junit-file", "/nonexistent/x"],
            1,
            "cannot write /nonexistent/x",
        ),
        (&["install", "-o", "json"], 1, "add --dry-run, which prints the objects"),
        (&["install", "--dry-run", "-n", "Bad NS"], 2, "a namespace has up to 63 of a-z"),
        (&["uninstall", "-o", "json"], 1, "this command has no JSON to print"),
        (&["demo", "starwars", "--in-cluster", "-o", "json"], 1, "no JSON to print"),
        (&["get", "pods"], 3, "/nonexistent/admin.sock"),
    ];
    for (arguments, code, says) in cases {
        let output = palisade(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", text(&output));
        assert!(text(&output).contains(says), "{arguments:?}: {}", text(&output));
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_command_quietly() {
    let commands = [
        "version --client",
        "version --client -o json",
        "install --dry-run",
        "install --dry-run -o json",
        "completion bash",
        "policy explain --from 192.0.2.1 --to 192.0.2.2 --port 80 -f /dev/null",
    ];
    for arguments in commands.map(|command| command.split(' ').collect::<Vec<_>>()) {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = palisade(&arguments);
        let output = command.stdout(writer).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output));
        assert!(output.stderr.is_empty(), "{}", text(&output));
    }
}
