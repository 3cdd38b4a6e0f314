//! Agents die; what they put into the kernel stays in force.

use rustix::process::{Pid, Signal, kill_process};

use super::{
    harness::{Lab, eventually},
    traffic::Siege,
};

const KILLS: usize = 50;

#[test]
fn killed_agents_let_nothing_through_and_cut_nothing_off() {
    let lab = Lab::up(2);
    let siege = Siege::begin(&lab);
    for round in 0..KILLS {
        let statuses = lab.statuses();
        let pids: Vec<u32> = statuses.iter().flatten().map(|status| status.pid).collect();
        assert_eq!(pids.len(), 2);
        for pid in &pids {
            let pid = Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
            kill_process(pid, Signal::KILL).unwrap();
        }
        if round == KILLS / 2 {
            // A change that nobody is there to hear.
            Siege::close_bystander(&lab);
        }
        eventually("the agents are ready again", || {
            lab.statuses().iter().all(|status| {
                status.as_ref().is_some_and(|now| now.ready && !pids.contains(&now.pid))
            })
        });
    }
    lab.await_policies(2);
    println!("{KILLS} kills of each of 2 agents");
    siege.end(10_000);
}
