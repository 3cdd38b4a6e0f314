//! Questions in connections: each with its length before it, answered in any order.

use std::{
    io,
    net::IpAddr,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    io::AsyncReadExt,
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Mutex, Semaphore},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{Flow, exchange, limits::TOO_MANY, record_excess, upstream::write_framed};
use crate::Proxy;

/// A connection in which nothing is asked for so long ends.
const IDLE: Duration = Duration::from_secs(10);
/// A client that does not read its answers for so long loses the connection.
const STUCK: Duration = Duration::from_secs(10);
/// Questions of one connection that are under way; more are not read yet.
const MOST: usize = 16;

/// Serves a connection until either end has enough of it.
pub(super) async fn serve(proxy: &Arc<Proxy>, stream: TcpStream, flow: Flow) {
    let (mut read, write) = stream.into_split();
    let write = Arc::new(Mutex::new(write));
    let slots = Arc::new(Semaphore::new(MOST));
    let mut answering = JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let Ok(Ok(message)) = timeout(IDLE, next(&mut read)).await else { break };
        keep_pace(proxy, flow.client.ip()).await;
        let Some(under_way) = proxy.dns.limits.admit(flow.client.ip()) else {
            record_excess(proxy, flow, &message, TOO_MANY);
            break;
        };
        let (proxy, write) = (Arc::clone(proxy), Arc::clone(&write));
        answering.spawn(async move {
            let _held = (slot, under_way);
            let Some(reply) = exchange(&proxy, flow, &message).await else { return Ok(()) };
            answer(&write, &reply).await
        });
        while let Some(ended) = answering.try_join_next() {
            if !matches!(ended, Ok(Ok(()))) {
                return;
            }
        }
    }
    // The client asks no more, and may still hear what it asked before.
    answering.join_all().await;
}

/// Waits until a client may ask one more: nothing is lost, its connections are read no faster.
async fn keep_pace(proxy: &Proxy, client: IpAddr) {
    let delay = {
        let mut pace = proxy.dns.pace.lock().unwrap_or_else(PoisonError::into_inner);
        pace.delay(client, Instant::now())
    };
    // Even a sleep of no time ends with the next tick only.
    if !delay.is_zero() {
        sleep(delay).await;
    }
}

async fn next(read: &mut OwnedReadHalf) -> io::Result<Vec<u8>> {
    let length = read.read_u16().await?;
    if length == 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; usize::from(length)];
    read.read_exact(&mut message).await?;
    Ok(message)
}

async fn answer(write: &Mutex<OwnedWriteHalf>, reply: &[u8]) -> io::Result<()> {
    let mut write = write.lock().await;
    timeout(STUCK, write_framed(&mut *write, reply)).await?
}
