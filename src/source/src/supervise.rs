//! The thread that keeps one worker running for a source.
//!
//! It starts workers (a child's death signal follows the *thread* that forked
//! it, so this one lives as long as the source), hears their answers, lets time
//! pass, replaces a worker that stopped answering, and buries the dead: slots
//! that a worker may have been writing stay out of use until it is reaped, and the
//! kernel writes nothing for it any more.

use crate::handle::{Event, Shared};
use crate::wire::{HELLO, MAX_REPLY, WireReply};
use crate::{Pool, Slot};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Dead or dying workers that may hold slots; no further one is started beyond.
const GRAVES: usize = 4;
/// Pause before a worker is started again; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often dying workers are looked at whose end cannot be waited for; and slots that
/// may still be written after it, with a pause that doubles up to [`LONGEST_LOOK`].
const BURIAL: Duration = Duration::from_millis(10);
const LONGEST_LOOK: Duration = Duration::from_secs(1);
/// How long to go on looking after an answer, without being woken for the next request.
const WATCH: Duration = Duration::from_millis(250);

/// A worker process.
pub(crate) struct Worker {
    child: Child,
    pub socket: Arc<OwnedFd>,
    /// It has said hello.
    pub ready: bool,
    /// When it last said anything.
    pub heard: Instant,
}

impl Worker {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn spawn(shared: &Shared) -> io::Result<Self> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let memory = rustix::io::fcntl_dupfd_cloexec(shared.arena.fd(), 3)?;
        let child = Command::new(&shared.command.program)
            .args(&shared.command.arguments)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(memory))
            .spawn()?;
        shared.counters.workers.fetch_add(1, Relaxed);
        Ok(Self {
            child,
            socket: Arc::new(ours),
            ready: false,
            heard: Instant::now(),
        })
    }
}

/// A worker that was given up, and the slots it may still write.
struct Grave {
    child: Child,
    /// Becomes readable when it has ended; a worker that is stuck in the kernel takes as
    /// long as its source does. `None` if there was no descriptor to be had.
    ended: Option<OwnedFd>,
    slots: Vec<Slot>,
}

impl Grave {
    fn new(child: Child, slots: Vec<Slot>) -> Self {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let ended = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Self {
            child,
            ended,
            slots,
        }
    }
}

/// The dead, and what they leave.
#[derive(Default)]
struct Graveyard {
    graves: Vec<Grave>,
    /// Slots of workers that have ended, which the kernel may still write for them.
    held: Vec<Slot>,
    /// When to look at those again, and how long to wait then.
    look: Option<(Instant, Duration)>,
}

impl Graveyard {
    /// Whether there is room for another worker's end. So many slots of the dead are kept
    /// at most as workers may have in use: storage that never ends a read that was begun must
    /// not take all memory.
    fn has_room(&self, shared: &Shared) -> bool {
        self.graves.len() < GRAVES && self.held.len() < shared.in_flight
    }

    /// Reaps workers that have ended, and puts slots back into use that nobody can write
    /// any more.
    fn tend(&mut self, shared: &Shared, now: Instant) {
        let mut at = 0;
        while at < self.graves.len() {
            if matches!(self.graves[at].child.try_wait(), Ok(None)) {
                at += 1;
                continue;
            }
            self.held.extend(self.graves.swap_remove(at).slots);
            self.look = Some((now, BURIAL));
            shared.counters.dying.store(self.graves.len(), Relaxed);
        }
        let Some((_, pause)) = self.look.filter(|(at, _)| *at <= now) else {
            return;
        };
        for mut slot in std::mem::take(&mut self.held) {
            let renewed = slot.renew();
            if matches!(renewed, Ok(false)) {
                self.held.push(slot);
                continue;
            }
            shared.lock().buried -= 1;
            match renewed {
                Ok(_) => Pool::take_back(slot),
                Err(error) => {
                    // Without new pages a late write could land in a slot that is
                    // in use: it is given up for good.
                    tracing::error!(source = %shared.name, %error, "a piece of the cache is lost");
                    std::mem::forget(slot);
                }
            }
        }
        let longer = (pause * 2).min(LONGEST_LOOK);
        if pause < LONGEST_LOOK && longer == LONGEST_LOOK && !self.held.is_empty() {
            tracing::warn!(
                source = %shared.name, slots = self.held.len(),
                "parts of the cache may still be written for a worker that has ended, and wait"
            );
        }
        self.look = (!self.held.is_empty()).then(|| (now + pause, longer));
        shared.counters.held.store(self.held.len(), Relaxed);
    }
}

/// When to start the next worker.
struct Restart {
    at: Instant,
    pause: Duration,
}

pub(crate) fn run(shared: &Shared) {
    let mut yard = Graveyard::default();
    let mut restart = Restart {
        at: Instant::now(),
        pause: FIRST_PAUSE,
    };
    loop {
        let now = Instant::now();
        yard.tend(shared, now);
        if shared.lock().closed {
            break;
        }
        start_if_due(shared, &yard, &mut restart, now);
        if shared.lock().is_stuck(now, yard.graves.is_empty()) {
            give_up(
                shared,
                &mut yard.graves,
                &mut restart,
                "it stopped answering",
            );
            continue;
        }
        let events = {
            let mut state = shared.lock();
            let events = state.tick(now, shared);
            state.send_waiting(shared);
            events
        };
        finish(events);
        match wait(shared, &yard, &restart) {
            Ok(false) => {}
            Ok(true) => {
                if let Err(reason) = hear(shared, &mut restart) {
                    give_up(shared, &mut yard.graves, &mut restart, &reason);
                }
            }
            Err(error) => {
                tracing::error!(source = %shared.name, %error, "cannot wait for the worker");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
    let (events, worker) = {
        let mut state = shared.lock();
        (state.end_all(shared), state.worker.take())
    };
    finish(events);
    // As those that a worker has: they may still be written.
    let graves = yard.graves.into_iter().flat_map(|grave| grave.slots);
    graves.chain(yard.held).for_each(std::mem::forget);
    if let Some(mut worker) = worker {
        // A worker stuck in the kernel ends when it can; nobody waits for it.
        let _ = worker.child.kill();
        for _ in 0..100 {
            if !matches!(worker.child.try_wait(), Ok(None)) {
                break;
            }
            std::thread::sleep(BURIAL);
        }
    }
}

fn finish(events: Vec<Event>) {
    for event in events {
        event.run();
    }
}

fn start_if_due(shared: &Shared, yard: &Graveyard, restart: &mut Restart, now: Instant) {
    if shared.lock().worker.is_some() || now < restart.at || !yard.has_room(shared) {
        return;
    }
    let worker = Worker::spawn(shared);
    let mut state = shared.lock();
    match worker {
        Ok(worker) => {
            state.heard = Some(worker.heard);
            state.worker = Some(worker);
        }
        Err(error) => {
            tracing::error!(source = %shared.name, %error, "cannot start a worker");
            state.refused = Some(format!("cannot start a worker: {error}"));
            restart.delay(now);
            shared.changed.notify_all();
        }
    }
}

impl Restart {
    fn delay(&mut self, now: Instant) {
        self.at = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

/// Kills the worker, if there is one, and has its attempts sent again.
fn give_up(shared: &Shared, graves: &mut Vec<Grave>, restart: &mut Restart, reason: &str) {
    let mut state = shared.lock();
    let Some(mut worker) = state.worker.take() else {
        return;
    };
    let (slots, events) = state.abandon_worker(shared);
    // One that never got ready is reported by whoever waits for it.
    if !state.closed && worker.ready {
        tracing::warn!(
            source = %shared.name, pid = worker.pid(), unanswered = slots.len(), reason,
            "replacing the source's worker"
        );
    }
    drop(state);
    shared.changed.notify_all();
    let _ = worker.child.kill();
    graves.push(Grave::new(worker.child, slots));
    shared.counters.dying.store(graves.len(), Relaxed);
    finish(events);
    restart.delay(Instant::now());
}

/// Sleeps until something happens; true if the worker said something.
fn wait(shared: &Shared, yard: &Graveyard, restart: &Restart) -> io::Result<bool> {
    let (deadline, socket, blocked) = {
        let mut state = shared.lock();
        let socket = state
            .worker
            .as_ref()
            .map(|worker| Arc::clone(&worker.socket));
        let mut deadline = state.next_tick();
        let mut until = |at: Instant| deadline = Some(deadline.map_or(at, |d| d.min(at)));
        if yard.graves.iter().any(|grave| grave.ended.is_none()) {
            until(Instant::now() + BURIAL);
        }
        if let Some((at, _)) = yard.look {
            until(at);
        }
        // Otherwise the next burial comes first.
        if state.worker.is_none() && yard.has_room(shared) {
            until(restart.at.max(Instant::now() + BURIAL));
        }
        let lately = state.heard.is_some_and(|at| at.elapsed() < WATCH);
        let watched = !state.is_idle() || lately;
        if watched {
            // Requests that came while this thread slept have deadlines too.
            until(Instant::now() + WATCH);
        }
        state.watched = watched;
        (deadline, socket, state.blocked)
    };
    let timeout = deadline.map(|at| at.saturating_duration_since(Instant::now()));
    let timeout = timeout.and_then(|time| rustix::event::Timespec::try_from(time).ok());
    let mut polled = vec![PollFd::new(&shared.wake, PollFlags::IN)];
    if let Some(socket) = &socket {
        let room = if blocked {
            PollFlags::OUT
        } else {
            PollFlags::empty()
        };
        polled.push(PollFd::new(socket, PollFlags::IN | room));
    }
    let ended = yard.graves.iter().filter_map(|grave| grave.ended.as_ref());
    polled.extend(ended.map(|ended| PollFd::new(ended, PollFlags::IN)));
    match rustix::event::poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    if !polled[0].revents().is_empty() {
        let _ = rustix::io::read(&shared.wake, &mut [0; 8]);
    }
    let said = socket.is_some() && polled.get(1).is_some_and(|fd| !fd.revents().is_empty());
    Ok(said)
}

/// Takes in everything the worker has said. An error means that it is gone.
fn hear(shared: &Shared, restart: &mut Restart) -> Result<(), String> {
    let mut buffer = [0; MAX_REPLY];
    loop {
        let mut state = shared.lock();
        state.blocked = false;
        let Some(worker) = &mut state.worker else {
            return Ok(());
        };
        let received =
            rustix::net::recv(worker.socket.as_fd(), &mut buffer[..], RecvFlags::DONTWAIT);
        let len = match received {
            Ok((0, _)) => return Err("it ended".to_owned()),
            Ok((len, _)) => len,
            Err(Errno::AGAIN) => {
                state.send_waiting(shared);
                return Ok(());
            }
            Err(Errno::INTR) => continue,
            Err(error) => return Err(format!("it cannot be heard: {error}")),
        };
        let now = Instant::now();
        worker.heard = now;
        state.heard = Some(now);
        let reply = WireReply::decode(&buffer[..len]).ok_or("it talks nonsense")?;
        if reply.id == HELLO {
            match reply.result {
                Ok(_) => {
                    if let Some(worker) = &mut state.worker {
                        worker.ready = true;
                    }
                    state.refused = None;
                    restart.pause = FIRST_PAUSE;
                    state.send_waiting(shared);
                }
                Err((errno, text)) => {
                    let text = if text.is_empty() {
                        errno.to_string()
                    } else {
                        text
                    };
                    state.refused = Some(text.clone());
                    return Err(text);
                }
            }
            shared.changed.notify_all();
            continue;
        }
        let event = state.answered(&reply, shared);
        state.send_waiting(shared);
        drop(state);
        if let Some(event) = event {
            event.run();
        }
    }
}
