//! The keeper itself. One thread; it never touches what it keeps but to close it.

use super::{Ask, Kept};
use crate::protocol::Reply;
use crate::wire;
use accel_source::privileges::{CapabilitySet, keep_only};
use accel_ufs::index::Root;
use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::collections::HashMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

/// How long a daemon may take to send the rest of a line, and to come at all.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs the keeper. The listening socket is standard input; `socket` is where it
/// lies.
pub fn run(socket: &Path) -> Result<()> {
    // Neither the daemon's terminal nor its end is ours.
    let _ = rustix::process::setsid();
    let listener = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .context("standard input is not the listening socket")?;
    let listener = UnixListener::from(listener);
    keep_only(CapabilitySet::empty()).context("cannot drop capabilities")?;
    listener.set_nonblocking(true)?;
    let mut keeper = Keeper {
        listener,
        clients: Vec::new(),
        held: HashMap::new(),
    };
    let result = keeper.serve();
    // Before the listener is closed: a daemon that finds no socket makes another.
    let _ = fs::remove_file(socket);
    result
}

struct Keeper {
    listener: UnixListener,
    clients: Vec<UnixStream>,
    held: HashMap<Root, OwnedFd>,
}

impl Keeper {
    fn serve(&mut self) -> Result<()> {
        let mut used = false;
        while !(used && self.held.is_empty()) {
            let ready = self.wait()?;
            if ready.is_empty() && self.held.is_empty() {
                // The daemon that started us is gone.
                return Ok(());
            }
            // From the back, so that the numbers before stay right.
            for at in ready.into_iter().rev() {
                match at {
                    Ready::Ended(root) => {
                        self.held.remove(&root);
                    }
                    Ready::Client(at) => {
                        if self.answer(at).is_err() {
                            self.clients.remove(at);
                        }
                    }
                    Ready::Listener => {
                        if let Ok((stream, _)) = self.listener.accept() {
                            stream.set_nonblocking(false)?;
                            stream.set_read_timeout(Some(PATIENCE))?;
                            stream.set_write_timeout(Some(PATIENCE))?;
                            self.clients.push(stream);
                        }
                    }
                }
            }
            used |= !self.held.is_empty();
        }
        Ok(())
    }

    /// Waits for a daemon. While there is none, also for connections to end, which
    /// they do when they are unmounted; a daemon sees to that itself, and every
    /// request would wake us.
    fn wait(&self) -> Result<Vec<Ready>> {
        let mut polled = vec![PollFd::new(&self.listener, PollFlags::IN)];
        let mut meaning = vec![Ready::Listener];
        for (at, client) in self.clients.iter().enumerate() {
            polled.push(PollFd::new(client, PollFlags::IN));
            meaning.push(Ready::Client(at));
        }
        if self.clients.is_empty() {
            for (root, fd) in &self.held {
                polled.push(PollFd::new(fd, PollFlags::empty()));
                meaning.push(Ready::Ended(*root));
            }
        }
        let limit = self.held.is_empty().then_some(PATIENCE);
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        match rustix::event::poll(&mut polled, limit.as_ref()) {
            Ok(_) => {}
            // Nothing was looked at: the listener says so without blocking.
            Err(rustix::io::Errno::INTR) => return Ok(vec![Ready::Listener]),
            Err(error) => return Err(error).context("cannot wait"),
        }
        let ready = polled.iter().zip(meaning);
        let ready = ready.filter(|(polled, _)| !polled.revents().is_empty());
        Ok(ready.map(|(_, meaning)| meaning).collect())
    }

    /// Answers one request. An error means that the daemon is gone.
    fn answer(&mut self, at: usize) -> Result<()> {
        let stream = &self.clients[at];
        let peer = rustix::net::sockopt::socket_peercred(stream)?;
        if !peer.uid.is_root() {
            anyhow::bail!("only root may ask");
        }
        let (ask, fd) = wire::receive::<Ask>(stream)?;
        let ok = Reply::Ok(());
        match ask {
            Ask::List => {
                let kept = Kept {
                    pid: rustix::process::getpid().as_raw_nonzero().get(),
                    roots: self.held.keys().copied().collect(),
                };
                wire::send(stream, &Reply::Ok(kept), None)
            }
            Ask::Keep(root) => {
                let fd = fd.context("no descriptor came")?;
                self.held.insert(root, fd);
                wire::send(stream, &ok, None)
            }
            Ask::Give(root) => match self.held.get(&root) {
                Some(fd) => wire::send(stream, &ok, Some(fd)),
                None => {
                    let error = Reply::<()>::Error(format!("{root} is not kept here"));
                    wire::send(stream, &error, None)
                }
            },
            Ask::Drop(root) => {
                self.held.remove(&root);
                wire::send(stream, &ok, None)
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Ready {
    Listener,
    Client(usize),
    Ended(Root),
}
