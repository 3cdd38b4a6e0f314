//! Whose question is next: clients take turns, however much one of them asks.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// The clients that are being served, and the way to the task of each. What one may put there is
/// bounded by [`super::limits`].
pub(super) struct Turns<Q>(Mutex<HashMap<IpAddr, UnboundedSender<Q>>>);

impl<Q> Default for Turns<Q> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<Q> Turns<Q> {
    /// Hands a question to the client's task; to a client without one it gives what
    /// [`Self::serve`] takes.
    pub(super) fn put(&self, client: IpAddr, question: Q) -> Option<Questions<Q>> {
        let mut served = self.lock();
        let question = match served.get(&client) {
            None => question,
            // A task that panicked takes nothing any more.
            Some(task) => task.send(question).err()?.0,
        };
        let (task, questions) = unbounded_channel();
        _ = task.send(question);
        served.insert(client, task);
        Some(Questions { client, questions })
    }

    /// Serves a client until none of its questions is left. After each step of one of them it is
    /// the turn of others.
    pub(super) async fn serve<F: Future<Output = ()>>(
        &self,
        mut of: Questions<Q>,
        answer: impl Fn(Q) -> F,
    ) {
        let mut under_way = FuturesUnordered::new();
        loop {
            tokio::select! {
                biased;
                Some(()) = under_way.next() => {}
                Some(question) = of.questions.recv() => under_way.push(answer(question)),
            }
            if under_way.is_empty() && self.leave(&of) {
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    /// Whether nothing is left to answer. Then the next question needs a new task.
    fn leave(&self, of: &Questions<Q>) -> bool {
        let mut served = self.lock();
        let done = of.questions.is_empty();
        if done {
            served.remove(&of.client);
        }
        done
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, UnboundedSender<Q>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the questions of a client come in.
pub(super) struct Questions<Q> {
    client: IpAddr,
    questions: UnboundedReceiver<Q>,
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, rc::Rc};

    use tokio::task::{LocalSet, yield_now};

    use super::*;

    fn client(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    /// One asks a hundred times before another asks once.
    #[tokio::test(flavor = "current_thread")]
    async fn one_question_is_not_behind_all_of_another_client() {
        let turns = Rc::new(Turns::default());
        let order = Rc::new(RefCell::new(Vec::new()));
        let tasks = LocalSet::new();
        let put = |n| {
            let Some(questions) = turns.put(client(n), n) else { return };
            let (turns, order) = (Rc::clone(&turns), Rc::clone(&order));
            tasks.spawn_local(async move {
                let answer = async |n| {
                    yield_now().await;
                    order.borrow_mut().push(n);
                };
                turns.serve(questions, answer).await;
            });
        };
        (0..100).for_each(|_| put(1));
        put(2);
        tasks.await;
        let order = order.take();
        assert_eq!(order.len(), 101);
        assert!(order.iter().position(|n| *n == 2) < Some(4), "{order:?}");
        assert!(turns.lock().is_empty());
    }

    #[test]
    fn a_client_whose_task_is_gone_gets_another() {
        let turns = Turns::default();
        drop(turns.put(client(1), 1).unwrap());
        let mut again = turns.put(client(1), 2).unwrap();
        assert_eq!(again.questions.try_recv(), Ok(2));
        assert!(turns.put(client(1), 3).is_none());
    }
}
