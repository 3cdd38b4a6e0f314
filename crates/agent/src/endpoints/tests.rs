//! Interfaces on which the kernel refuses programs, and programs that go.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
};

use palisade_api::cni::{ContainerId, IfName, Pod};

use super::*;
use crate::{
    cni::{Addresses, HostLink},
    engine::Command,
    tables::TablesWriter,
};

/// One interface.
#[derive(Default)]
struct Fake {
    refuses: AtomicBool,
    immovable: AtomicBool,
    attached: AtomicBool,
    attached_before: AtomicBool,
    gone: AtomicBool,
    down: AtomicBool,
}

impl Attach for Arc<Fake> {
    fn attach(&self, _: &str) -> Result<(), String> {
        if self.refuses.load(Ordering::SeqCst) || self.gone.load(Ordering::SeqCst) {
            return Err("no memory".into());
        }
        self.attached.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn detach(&self, _: &str) -> Result<(), String> {
        self.attached.store(false, Ordering::SeqCst);
        Ok(())
    }

    async fn sweep(&self) -> Result<(), String> {
        Ok(())
    }

    fn is_attached(&self, _: &str) -> bool {
        self.attached.load(Ordering::SeqCst)
    }

    fn is_judged(&self, _: &str) -> bool {
        self.attached_before.load(Ordering::SeqCst) || self.attached.load(Ordering::SeqCst)
    }

    async fn link(&self, _: &Endpoint) -> Result<LinkState, String> {
        Ok(match (self.gone.load(Ordering::SeqCst), self.down.load(Ordering::SeqCst)) {
            (true, _) => LinkState::Gone,
            (false, true) => LinkState::Closed,
            (false, false) => LinkState::Left,
        })
    }

    async fn close(&self, _: &Endpoint) -> Result<(), String> {
        if self.immovable.load(Ordering::SeqCst) {
            return Err("not permitted".into());
        }
        self.down.store(true, Ordering::SeqCst);
        Ok(())
    }

    async fn reopen(&self, _: &Endpoint, _: String) -> Result<(), String> {
        assert!(self.attached.load(Ordering::SeqCst), "up without programs");
        self.down.store(false, Ordering::SeqCst);
        Ok(())
    }
}

impl Fake {
    fn lets_unjudged_through(&self) -> bool {
        !self.attached.load(Ordering::SeqCst) && !self.down.load(Ordering::SeqCst)
    }
}

struct Bench {
    link: Arc<Fake>,
    lifecycle: Lifecycle<Arc<Fake>>,
    health: Arc<Health>,
    told: mpsc::Receiver<Command>,
}

impl Bench {
    async fn restart(link: Arc<Fake>) -> Self {
        Self::restart_with(link, Succession::AtOnce).await
    }

    async fn restart_with(link: Arc<Fake>, succession: Succession) -> Self {
        let (commands, told) = mpsc::channel(8);
        let (publications, _) = mpsc::unbounded_channel();
        let health = Arc::new(Health::default());
        let outputs = Outputs { commands, publications, health: health.clone() };
        let tables = TablesWriter::default().reader();
        let progress = watch::channel(Progress::default()).1;
        let recorded = vec![(record(), 7)];
        let lifecycle =
            Lifecycle::restore(link.clone(), tables, progress, outputs, recorded, succession)
                .await
                .expect("an engine that listens");
        Self { link, lifecycle, health, told }
    }

    fn restored(&mut self) -> usize {
        match self.told.try_recv().expect("what was restored") {
            Command::Intent(intent) => match *intent {
                Intent::Endpoint(Change::Replace(rows)) => rows.len(),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }
}

fn record() -> NewEndpoint {
    NewEndpoint {
        attachment: Attachment {
            container_id: ContainerId::try_from("c1".to_owned()).expect("an id"),
            ifname: IfName::try_from("eth0".to_owned()).expect("a name"),
        },
        pod: Pod { namespace: "default".into(), name: "web".into(), uid: None },
        host: HostLink { name: "lxc1".into(), ifindex: 11, mac: [4; 6] },
        mac: [2; 6],
        addresses: Addresses { ipv4: Some([10, 0, 1, 5].into()), ipv6: None },
        netns: PathBuf::new(),
    }
}

#[tokio::test]
async fn a_pod_whose_programs_cannot_be_attached_is_cut_off_until_they_can() {
    let link = Arc::new(Fake::default());
    link.refuses.store(true, Ordering::SeqCst);
    let mut bench = Bench::restart(link).await;
    assert!(!bench.link.lets_unjudged_through());
    assert_eq!(bench.restored(), 1, "it is an endpoint all the same");
    let [problem] = &bench.health.problems()[..] else { panic!("one problem") };
    assert!(problem.contains("default/web") && problem.contains("no memory"), "{problem}");

    bench.lifecycle.look_at_programs().await;
    assert!(bench.link.down.load(Ordering::SeqCst) && bench.health.has_problem("lxc1"));

    bench.link.refuses.store(false, Ordering::SeqCst);
    bench.lifecycle.look_at_programs().await;
    assert!(bench.link.attached.load(Ordering::SeqCst) && !bench.link.down.load(Ordering::SeqCst));
    assert_eq!(bench.health.problems(), Vec::<String>::new());
}

#[tokio::test]
async fn a_pod_that_an_earlier_agent_cut_off_comes_back() {
    let link = Arc::new(Fake::default());
    link.down.store(true, Ordering::SeqCst);
    let bench = Bench::restart(link).await;
    assert!(bench.link.attached.load(Ordering::SeqCst) && !bench.link.down.load(Ordering::SeqCst));
}

#[tokio::test]
async fn an_interface_that_cannot_be_taken_down_is_said_to_be_open_and_tried_again() {
    let link = Arc::new(Fake::default());
    link.refuses.store(true, Ordering::SeqCst);
    link.immovable.store(true, Ordering::SeqCst);
    let bench = Bench::restart(link).await;
    let [problem] = &bench.health.problems()[..] else { panic!("one problem") };
    assert!(problem.contains("nothing judges"), "{problem}");
    bench.link.immovable.store(false, Ordering::SeqCst);
    bench.lifecycle.look_at_programs().await;
    assert!(!bench.link.lets_unjudged_through());
}

#[tokio::test]
async fn an_endpoint_without_interface_is_none() {
    let link = Arc::new(Fake::default());
    link.gone.store(true, Ordering::SeqCst);
    let mut bench = Bench::restart(link).await;
    assert_eq!(bench.restored(), 0);
    assert_eq!(bench.health.problems(), Vec::<String>::new());
}

#[tokio::test]
async fn programs_of_before_judge_until_the_new_tables_are_filled() {
    let link = Arc::new(Fake::default());
    link.attached_before.store(true, Ordering::SeqCst);
    let mut bench = Bench::restart_with(link, Succession::Later).await;
    assert!(!bench.link.attached.load(Ordering::SeqCst));
    assert_eq!(bench.restored(), 1, "the tables are filled for it");
    bench.lifecycle.attach_all().await;
    assert!(bench.link.attached.load(Ordering::SeqCst));
    assert_eq!(bench.health.reattached(), 0, "nobody detached anything");
}

#[tokio::test]
async fn a_pod_that_nothing_judges_is_not_left_so() {
    let bench = Bench::restart_with(Arc::new(Fake::default()), Succession::Later).await;
    assert!(bench.link.attached.load(Ordering::SeqCst));
}

#[tokio::test]
async fn programs_that_somebody_detaches_come_back_and_are_counted() {
    let bench = Bench::restart(Arc::new(Fake::default())).await;
    assert_eq!(bench.health.reattached(), 0, "a restart detaches nothing");
    bench.link.attached.store(false, Ordering::SeqCst);
    bench.lifecycle.look_at_programs().await;
    assert!(bench.link.attached.load(Ordering::SeqCst));
    assert_eq!(bench.health.reattached(), 1);
    bench.lifecycle.look_at_programs().await;
    assert_eq!(bench.health.reattached(), 1);
}

#[tokio::test]
async fn an_endpoint_that_leaves_is_not_looked_after() {
    let bench = Bench::restart(Arc::new(Fake::default())).await;
    bench.link.attached.store(false, Ordering::SeqCst);
    bench.lifecycle.remove(&record().attachment).await.expect("removed");
    bench.link.refuses.store(true, Ordering::SeqCst);
    bench.lifecycle.look_at_programs().await;
    assert_eq!(bench.health.problems(), Vec::<String>::new());
    assert!(!bench.link.down.load(Ordering::SeqCst));
}
