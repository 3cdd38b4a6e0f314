//! An API server that does not accept the token any more, or has too much to do: what is in force
//! stays in force, and what happened meanwhile comes into force after.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::{Duration, Instant},
};

use http::StatusCode;
use palisade_lab::nodes::Program;

use super::{
    gate::{Asked, Gate, Refusal, Seen},
    harness::{Lab, Pod, eventually, within},
    install::{pretend, run, succeeds},
    operator::{Operator, holder, networks, transitions},
    silence::CALM,
    status::stand_in,
    traffic::{Flow, Siege, serve_echo},
};

/// A new token is taken within this time, and what follows from it is in force.
const RENEWED: Duration = Duration::from_secs(20);
/// After a while with too much to do the server is asked again within this time.
const RELIEVED: Duration = Duration::from_secs(30);
/// Two agents read eleven kinds of objects each.
const READ_BY_TWO: usize = 22;
/// By then a leader that may not renew its Lease has ended.
const LOST: Duration = Duration::from_secs(20);

const LATE: &str = r"
apiVersion: v1
kind: Pod
metadata: {name: late, labels: {app: late}}
spec: {nodeName: node1, containers: [{name: pause, image: registry.k8s.io/pause}]}
";
const LATER: &str = r"
apiVersion: v1
kind: Pod
metadata: {name: later, labels: {app: later}}
spec: {nodeName: node2, containers: [{name: pause, image: registry.k8s.io/pause}]}
";
/// It is about nobody, and each agent says once that it is in force.
const TOLD: &str = r"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: told}
spec: {endpointSelector: {matchLabels: {app: nobody}}, ingress: [{}]}
";
/// Nobody reaches it.
const SHUT: &str = r"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: shut}
spec: {podSelector: {matchLabels: {app: shut}}, policyTypes: [Ingress]}
";

/// Only one pod reaches another.
fn turn_to(app: &str) -> String {
    format!(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: turn}}\n\
         spec:\n  endpointSelector: {{matchLabels: {{app: turn}}}}\n  \
         ingress: [{{fromEndpoints: [{{matchLabels: {{app: {app}}}}}]}}]\n"
    )
}

/// Pods whose policies change while nobody hears of it.
struct Changes<'a> {
    lab: &'a Lab,
    one: Pod,
    other: Pod,
    bystander: Pod,
    shut: Pod,
    turn: Pod,
}

impl<'a> Changes<'a> {
    /// In a lab under siege.
    fn prepare(lab: &'a Lab) -> Self {
        let [one, other, shut, turn] =
            lab.pods([("one", 1), ("other", 2), ("shut", 1), ("turn", 2)]);
        serve_echo(&shut);
        serve_echo(&turn);
        lab.apply(&[SHUT, &turn_to("one")].join("---\n"));
        lab.await_policies(3);
        Self { lab, one, other, bystander: lab.pod("default", "bystander"), shut, turn }
    }

    /// One policy is made, one changes and one goes.
    fn make(&self) {
        Siege::close_bystander(self.lab);
        self.lab.apply(&turn_to("other"));
        self.lab.kubectl(&["delete", "networkpolicy", "shut"]);
    }

    /// Who reaches whom, over IPv4 and IPv6: the bystander, the one that is shut, and one and the
    /// other the one that turns.
    fn open(&self) -> [[bool; 2]; 4] {
        let ways = [
            (&self.one, &self.bystander),
            (&self.one, &self.shut),
            (&self.one, &self.turn),
            (&self.other, &self.turn),
        ];
        ways.map(|(from, to)| to.addresses.map(|to| Flow::tcp(from, to).is_ok()))
    }

    fn unheard_of(&self) {
        let before = [true, false, true, false].map(|open| [open; 2]);
        assert_eq!(self.open(), before, "what was in force is in force");
    }

    fn in_force(&self, time: Duration) {
        let begun = Instant::now();
        let after = [false, true, false, true].map(|open| [open; 2]);
        within(time, "what happened meanwhile is in force", || self.open() == after);
        println!("in force after {:?}", begun.elapsed());
    }
}

/// Whether this is so of the error of each kind of object that each agent reads.
fn errors(lab: &Lab, holds: impl Fn(Option<&str>) -> bool) -> bool {
    let its_own = ["Endpoint", "LearnedNames"];
    lab.statuses().into_iter().all(|status| {
        let Some(status) = status else { return false };
        let mut inputs = status.inputs.iter().filter(|it| !its_own.contains(&it.kind.as_str()));
        inputs.all(|input| holds(input.error.as_deref()))
    })
}

fn say(lab: &Lab, words: &[&str]) -> bool {
    errors(lab, |error| error.is_some_and(|error| words.iter().all(|word| error.contains(word))))
}

fn pids(lab: &Lab) -> Vec<Option<u32>> {
    lab.statuses().into_iter().map(|status| Some(status?.pid)).collect()
}

fn ready(lab: &Lab, pod: &str) {
    lab.kubectl(&["wait", "--for=condition=Ready", "--timeout=60s", &format!("pod/{pod}")]);
}

fn everybody(_: &Asked) -> bool {
    true
}

fn who_writes(asked: &Asked) -> bool {
    asked.method != "GET"
}

fn for_the_lease(asked: &Asked) -> bool {
    asked.path.contains("/leases/")
}

fn too_many(whom: fn(&Asked) -> bool) -> Option<Refusal> {
    Some(Refusal { status: StatusCode::TOO_MANY_REQUESTS, retry_after: 1, whom })
}

/// When each was turned away that asked the same.
fn refused(seen: Vec<Seen>) -> BTreeMap<Asked, Vec<Instant>> {
    let mut refused: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for seen in seen.into_iter().filter(|seen| seen.status != StatusCode::OK) {
        refused.entry(seen.asked).or_default().push(seen.at);
    }
    refused
}

/// Nobody came back sooner than the server asked for, and each came back later than before.
fn spared(refused: &BTreeMap<Asked, Vec<Instant>>) {
    for (asked, times) in refused {
        let pauses: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(pauses.iter().all(|pause| *pause > Duration::from_secs(1)), "{asked:?} {pauses:?}");
        if let [first, _, third, ..] = pauses[..] {
            assert!(third > first, "{asked:?} {pauses:?}");
        }
    }
}

#[test]
fn a_new_token_is_taken_without_a_restart_and_the_time_until_then_changes_nothing() {
    let lab = Lab::up(2);
    let gate = Gate::for_agents(&lab, 2, "first");
    let siege = Siege::begin(&lab);
    let changes = Changes::prepare(&lab);
    let before = pids(&lab);

    // Who watches goes on, as the token is looked at only when somebody begins to: a minute ago at
    // most.
    let begun = Instant::now();
    gate.cut();
    eventually("all watch anew", || {
        let watched = gate.seen(begun).into_iter().filter(|seen| seen.status == StatusCode::OK);
        watched.map(|seen| seen.asked).collect::<BTreeSet<_>>().len() >= READ_BY_TWO
    });
    gate.accept("second");
    lab.apply_policy("default", "heard-of", "{podSelector: {matchLabels: {app: nobody}}}");
    gate.cut();
    let file: PathBuf = lab.node_kubeconfig().with_file_name("token");
    let named = [&file.to_string_lossy(), "401 Unauthorized"];
    within(RENEWED, "the agents say which token it is", || say(&lab, &named));
    changes.make();
    lab.apply(LATE);
    changes.unheard_of();

    // An agent that starts now holds what is pinned.
    lab.kill(1, Program::Agent);
    within(RENEWED, "another agent says so, too", || {
        pids(&lab)[0].is_some_and(|pid| Some(pid) != before[0]) && say(&lab, &named)
    });
    changes.unheard_of();

    gate.issue("second");
    changes.in_force(RENEWED);
    ready(&lab, "late");
    siege.end(10_000);
    within(CALM, "the agents are content", || errors(&lab, |error| error.is_none()));
    assert_eq!(pids(&lab)[1], before[1], "the agent did not start again");
}

#[test]
fn a_server_with_too_much_to_do_is_spared_and_nothing_is_lost() {
    let lab = Lab::up(2);
    let gate = Gate::for_agents(&lab, 2, "token");
    let siege = Siege::begin(&lab);
    let changes = Changes::prepare(&lab);
    let before = pids(&lab);

    // Nobody may write: a pod gets no identity, and waits, and so does what is to be said once.
    let begun = Instant::now();
    gate.refuse(too_many(who_writes));
    lab.apply(&[LATE, TOLD].join("---\n"));
    let identity = |asked: &Asked| asked.path.ends_with("/ciliumidentities");
    within(RELIEVED, "an identity is asked for three times", || {
        refused(gate.seen(begun)).iter().any(|(it, times)| identity(it) && times.len() >= 3)
    });
    spared(&refused(gate.seen(begun)));
    changes.unheard_of();
    gate.refuse(None);
    ready(&lab, "late");
    let endpoint = || lab.try_kubectl(&["get", "ciliumendpoint", "late"]);
    within(RELIEVED, "its endpoint is told", || endpoint().is_some());
    let valid = "--for=jsonpath={.status.conditions[?(@.type=='Valid')].status}=True";
    lab.kubectl(&["wait", valid, "--timeout=30s", "cnp/told"]);

    // Nobody may do anything.
    let begun = Instant::now();
    gate.refuse(too_many(everybody));
    gate.cut();
    within(RENEWED, "the agents say why they hear nothing", || {
        say(&lab, &["429 Too Many Requests: Not now."])
    });
    changes.make();
    lab.apply(LATER);
    let unavailable =
        Refusal { status: StatusCode::SERVICE_UNAVAILABLE, retry_after: 1, whom: everybody };
    gate.refuse(Some(unavailable));
    within(RELIEVED, "the agents say why they hear nothing", || {
        say(&lab, &["503 Service Unavailable: Not now."])
    });
    let readers = |seen| {
        let refused = refused(seen).into_iter();
        refused.filter(|(asked, _)| asked.method == "GET").collect::<BTreeMap<_, _>>()
    };
    within(RELIEVED, "all have asked four times", || {
        readers(gate.seen(begun)).values().all(|times| times.len() >= 4)
    });
    let refused = readers(gate.seen(begun));
    assert!(refused.len() >= READ_BY_TWO, "{refused:?}");
    spared(&refused);
    changes.unheard_of();
    gate.refuse(None);
    changes.in_force(RELIEVED);
    ready(&lab, "later");
    siege.end(10_000);
    within(RELIEVED + CALM, "the agents are content", || errors(&lab, |error| error.is_none()));
    assert_eq!(pids(&lab), before, "no agent started again");
}

#[test]
fn a_pod_whose_object_cannot_be_written_is_managed_all_the_same() {
    let lab = Lab::up(1);
    succeeds(&lab, &["install"]);
    pretend(&lab, "palisade", 1, 1);
    stand_in(&lab);
    let gate = Gate::for_agents(&lab, 1, "token");
    gate.refuse(too_many(who_writes));
    lab.apply(LATE);
    ready(&lab, "late");
    let status = || run(&lab, &["status"]).1;
    within(RELIEVED, "it is said what is so", || {
        let text = status();
        assert!(!text.contains("did not give"), "{text}");
        let managed = "1 pod is managed by Palisade, but without a CiliumEndpoint yet: ";
        text.lines().any(|line| line.contains(managed) && line.contains("429 Too Many Requests"))
    });
    gate.refuse(None);
    within(RELIEVED, "there is nothing to say", || !status().contains("CiliumEndpoint"));
}

#[test]
fn the_operator_keeps_its_lease_over_a_refusal_and_regains_it_after_a_long_one() {
    let lab = Lab::up(1);
    let gate = Gate::new(&lab, "first");
    let mut operator = Operator::start_on_node(&lab, "only");
    let leads = || holder(&lab).as_deref() == Some("only");
    eventually("the operator leads", leads);
    let terms = transitions(&lab);
    let works = |name: &str| {
        lab.apply(&format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n"));
        within(RELIEVED, "a node gets networks", || networks(&lab, name).len() == 2);
    };
    works("joined1");
    let of_the_lease = |begun: Instant, good: bool| {
        let seen = gate.seen(begun).into_iter().filter(|seen| for_the_lease(&seen.asked));
        seen.filter(|seen| (seen.status == StatusCode::OK) == good).count()
    };
    let again = |what: &str, good: bool| {
        let begun = Instant::now();
        eventually(what, || of_the_lease(begun, good) >= 2);
    };

    gate.accept("second");
    again("the Lease is refused", false);
    gate.issue("second");
    again("the Lease is renewed", true);
    gate.refuse(too_many(for_the_lease));
    again("the Lease is refused", false);
    gate.refuse(None);
    again("the Lease is renewed", true);
    works("joined2");
    assert_eq!((transitions(&lab), operator.ended()), (terms, false), "it led all the time");

    // Another one could lead by now.
    gate.accept("third");
    within(LOST, "the operator ends", || operator.ended());
    // The kubelet starts it again.
    let begun = Instant::now();
    let _operator = Operator::start_on_node(&lab, "only");
    eventually("it asks for the Lease", || of_the_lease(begun, false) >= 2);
    gate.issue("third");
    let begun = Instant::now();
    within(RELIEVED, "it asks for the Lease with the new token", || of_the_lease(begun, true) >= 2);
    assert!(leads());
    works("joined3");
}
