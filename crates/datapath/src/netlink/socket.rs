//! One netlink socket: batches of requests in one system call, and dumps that are complete.
//!
//! Requests are sent together and the kernel carries them out in order, so a batch costs one
//! round trip. Every request is acknowledged explicitly: a lost answer is an error, never a
//! success.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind,
    netlink::SocketAddrNetlink, recv, send, socket_with, sockopt,
};

use super::NetlinkError;

/// `NETLINK_ROUTE` is protocol zero.
const NETLINK_ROUTE: Option<Protocol> = None;

/// The kernel answers in microseconds; it may wait for its global lock behind hundreds of others.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// News that are waited for are asked for after so long without any.
pub(super) const SILENCE: Duration = Duration::from_secs(1);

/// Room for the answers to a batch, so that none is dropped.
const RECEIVE_BUFFER: usize = 1 << 20;

/// The kernel's dumps come in pieces of at most 32 KiB.
const DATAGRAM: usize = 64 << 10;

/// A dump that changes underneath is taken again so many times.
const DUMP_ATTEMPTS: usize = 16;

/// Changes that a socket can be told of (linux/rtnetlink.h).
#[derive(Debug, Clone, Copy)]
pub(super) enum News {
    /// `RTMGRP_LINK`.
    Links = 1,
    /// `RTMGRP_IPV6_ROUTE`.
    Ipv6Routes = 0x400,
}

/// One request of a batch.
pub(super) struct Call {
    /// What it does, for the error message.
    pub(super) what: String,
    /// The message.
    pub(super) message: RouteNetlinkMessage,
    /// Flags beside REQUEST and ACK.
    pub(super) flags: u16,
    /// Errors that mean that there is nothing to do.
    pub(super) ignore: &'static [Errno],
}

pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    datagram: Vec<u8>,
    parsed: VecDeque<NetlinkMessage<RouteNetlinkMessage>>,
}

impl Socket {
    /// Opens a socket in the namespace of the calling thread.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        Self::try_open().map_err(|errno| NetlinkError::kernel("open a netlink socket", errno))
    }

    fn try_open() -> Result<Self, Errno> {
        let fd = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            NETLINK_ROUTE,
        )?;
        sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        // Without CAP_NET_ADMIN in the first user namespace the usual limit has to do.
        if sockopt::set_socket_recv_buffer_size_force(&fd, RECEIVE_BUFFER).is_err() {
            sockopt::set_socket_recv_buffer_size(&fd, RECEIVE_BUFFER)?;
        }
        Ok(Self { fd, sequence: 0, datagram: vec![0; DATAGRAM], parsed: VecDeque::new() })
    }

    /// Waits until `holds` does, which asks the kernel: at once, after each change of the kind, and
    /// after a silence. `what` is not done yet where that takes too long.
    pub(super) fn wait_until(
        news: News,
        what: &str,
        mut holds: impl FnMut(&mut Self) -> Result<bool, NetlinkError>,
    ) -> Result<(), NetlinkError> {
        let failed = |errno| NetlinkError::kernel(what, errno);
        // Questions go by a socket of their own: news that come between a question and its answer,
        // which may not know of them yet, are not passed over for it.
        let mut questions = Self::open()?;
        let mut told = Self::open()?;
        sockopt::set_socket_timeout(&told.fd, sockopt::Timeout::Recv, Some(SILENCE))
            .map_err(failed)?;
        // Before the first question: no change is missed.
        bind(&told.fd, &SocketAddrNetlink::new(0, news as u32)).map_err(failed)?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        while !holds(&mut questions)? {
            if Instant::now() > deadline {
                return Err(failed(Errno::TIMEDOUT));
            }
            match told.receive(what) {
                // What was lost may have been it.
                Ok(_) | Err(NetlinkError::Kernel { errno: Errno::NOBUFS | Errno::AGAIN, .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn set_receive_buffer(&self, bytes: usize) -> std::io::Result<()> {
        Ok(sockopt::set_socket_recv_buffer_size(&self.fd, bytes)?)
    }

    /// Sends all requests at once and waits for all acknowledgements. Later requests are carried
    /// out even if an earlier one fails; the first failure is reported.
    pub(super) fn batch(&mut self, calls: Vec<Call>) -> Result<(), NetlinkError> {
        if calls.is_empty() {
            return Ok(());
        }
        let first = self.sequence + 1;
        let mut buffer = Vec::new();
        let mut pending = Vec::with_capacity(calls.len());
        for call in calls {
            self.append(&mut buffer, call.message, NLM_F_REQUEST | NLM_F_ACK | call.flags);
            pending.push((call.what, call.ignore, None::<Option<Errno>>));
        }
        send(&self.fd, &buffer, SendFlags::empty())
            .map_err(|errno| NetlinkError::kernel(&pending[0].0, errno))?;
        let mut open = pending.len();
        while open > 0 {
            let answer = self.receive("wait for the kernel's answer")?;
            let NetlinkPayload::Error(error) = answer.payload else { continue };
            let slot = answer.header.sequence_number.checked_sub(first).map(|index| index as usize);
            let Some((_, _, result @ None)) = slot.and_then(|index| pending.get_mut(index)) else {
                continue;
            };
            *result = Some(error.code.map(|code| Errno::from_raw_os_error(-code.get())));
            open -= 1;
        }
        for (what, ignore, result) in pending {
            match result.flatten() {
                Some(errno) if !ignore.contains(&errno) => {
                    return Err(NetlinkError::kernel(what, errno));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Asks for one object; `None` if there is none.
    pub(super) fn get(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Option<RouteNetlinkMessage>, NetlinkError> {
        let mut buffer = Vec::new();
        let sequence = self.append(&mut buffer, message, NLM_F_REQUEST);
        send(&self.fd, &buffer, SendFlags::empty())
            .map_err(|errno| NetlinkError::kernel(what, errno))?;
        loop {
            let answer = self.receive(what)?;
            if answer.header.sequence_number != sequence {
                continue;
            }
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => return Ok(Some(message)),
                NetlinkPayload::Error(error) => {
                    return match error.code.map(|code| Errno::from_raw_os_error(-code.get())) {
                        None | Some(Errno::NODEV | Errno::NOENT) => Ok(None),
                        Some(errno) => Err(NetlinkError::kernel(what, errno)),
                    };
                }
                _ => {}
            }
        }
    }

    /// Lists all objects of a kind. A dump that the kernel marks as interrupted, or of which
    /// parts were lost, is taken again from the start; a short list is never returned.
    pub(super) fn dump(
        &mut self,
        what: &str,
        request: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(list) = self.dump_once(what, request)? {
                return Ok(list);
            }
        }
        Err(NetlinkError::Unsettled { what: what.to_owned(), attempts: DUMP_ATTEMPTS })
    }

    fn dump_once(
        &mut self,
        what: &str,
        request: &RouteNetlinkMessage,
    ) -> Result<Option<Vec<RouteNetlinkMessage>>, NetlinkError> {
        let mut buffer = Vec::new();
        let sequence = self.append(&mut buffer, request.clone(), NLM_F_REQUEST | NLM_F_DUMP);
        match send(&self.fd, &buffer, SendFlags::empty()) {
            Ok(_) => {}
            // Left over from an earlier, abandoned dump: it ends when it is read.
            Err(Errno::BUSY) => return self.reopen_and_retry(),
            Err(errno) => return Err(NetlinkError::kernel(what, errno)),
        }
        let mut list = Vec::new();
        let mut consistent = true;
        loop {
            let answer = match self.receive(what) {
                Ok(answer) => answer,
                Err(NetlinkError::Kernel { errno: Errno::NOBUFS, .. }) => {
                    return self.reopen_and_retry();
                }
                Err(error) => return Err(error),
            };
            if answer.header.sequence_number != sequence {
                continue;
            }
            consistent &= answer.header.flags & NLM_F_DUMP_INTR == 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => list.push(message),
                NetlinkPayload::Done(done) if done.code < 0 => {
                    match Errno::from_raw_os_error(-done.code) {
                        Errno::INTR => return Ok(None),
                        errno => return Err(NetlinkError::kernel(what, errno)),
                    }
                }
                NetlinkPayload::Done(_) => return Ok(consistent.then_some(list)),
                NetlinkPayload::Error(error) => {
                    let errno = error.code.map(|code| Errno::from_raw_os_error(-code.get()));
                    return Err(NetlinkError::kernel(what, errno.unwrap_or(Errno::PROTO)));
                }
                NetlinkPayload::Overrun(_) => return self.reopen_and_retry(),
                _ => {}
            }
        }
    }

    /// What is still in flight belongs to the old socket and goes with it.
    fn reopen_and_retry<T>(&mut self) -> Result<Option<T>, NetlinkError> {
        let sequence = self.sequence;
        *self = Self::open()?;
        self.sequence = sequence;
        Ok(None)
    }

    fn append(&mut self, buffer: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) -> u32 {
        self.sequence += 1;
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let start = buffer.len();
        // Netlink aligns messages at four bytes.
        buffer.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut buffer[start..]);
        self.sequence
    }

    fn receive(&mut self, what: &str) -> Result<NetlinkMessage<RouteNetlinkMessage>, NetlinkError> {
        loop {
            if let Some(message) = self.parsed.pop_front() {
                return Ok(message);
            }
            let received = recv(&self.fd, &mut self.datagram[..], RecvFlags::TRUNC);
            let len = match received {
                Ok((_, len)) => len,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(NetlinkError::kernel(what, errno)),
            };
            if len > self.datagram.len() {
                return Err(NetlinkError::kernel(what, Errno::NOBUFS));
            }
            self.parse(what, len)?;
        }
    }

    fn parse(&mut self, what: &str, len: usize) -> Result<(), NetlinkError> {
        let mut rest = &self.datagram[..len];
        while !rest.is_empty() {
            let message = NetlinkMessage::deserialize(rest).map_err(|error| {
                NetlinkError::Malformed { what: what.to_owned(), reason: error.to_string() }
            })?;
            let step = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(step..).unwrap_or_default();
            self.parsed.push_back(message);
        }
        Ok(())
    }
}
