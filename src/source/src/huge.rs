//! Which parts of the arena are made huge pages, and when.
//!
//! A *piece* is as much of the arena as a huge page holds: the slots of sixteen chunks. What
//! is served is copied page by page, and costs least where that is one page. The arena's
//! memory comes as ordinary pages, slot by slot; the kernel is asked to move a piece into a
//! huge page
//!
//! * when it is *full*: memory is missing to less than one chunk of it, so that it takes no
//!   more than that then. What is missing is behind the last chunks of layers;
//! * a moment later, because nothing may hold its pages then, by a thread that does nothing
//!   else and holds no lock meanwhile;
//! * as slowly as leaves the processors to others, and slower still while memory comes: a
//!   container that starts then waits for every read, and may need each byte once;
//! * up to [`ATTEMPTS`] times. A piece that stays in ordinary pages is served all the same.
//!
//! A huge piece stays one, whatever is read into it later, until a slot of it is *renewed*
//! (`Slot::renew`): the kernel takes it apart for that. When the slot has been read into, the
//! piece is full again.
//!
//! [`Pieces`] knows neither memory nor time; [`run`] is the thread.

use accel_sys::{HUGE_PAGE, HugePages};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::arena::CHUNK_SLOT;

/// A piece that misses less is full.
const MISSING: usize = CHUNK_SLOT;
/// How long a piece is full before it is tried; doubles with every attempt.
const PAUSE: Duration = Duration::from_secs(1);
/// How often a piece is tried.
const ATTEMPTS: u32 = 5;
/// When the kernel had no huge page to give, none is asked for during this time.
const SHORTAGE: Duration = Duration::from_secs(10);
/// How many times as long as the last attempt took the thread then rests: it uses a fifth of
/// a processor at most.
const REST: u32 = 4;
/// The same while memory comes, and for [`QUIET`] after it: a hundredth.
const LONG_REST: u32 = 99;
/// When no memory has come for so long, whoever read for the first time has what it needed,
/// or the cache is full, and few pieces are left.
const QUIET: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// In ordinary pages.
    Ordinary,
    /// Full, and to be tried at that time.
    Due { at: Instant, attempts: u32 },
    /// The kernel is at work on it.
    Tried {
        attempts: u32,
        /// A slot was renewed meanwhile: what comes of it is not known.
        disturbed: bool,
    },
    /// One huge page.
    Huge,
    /// Full, and in ordinary pages for good.
    GivenUp,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Bytes that have memory.
    backed: usize,
    stage: Stage,
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Make this piece huge, then say what came of it.
    Try(usize),
    /// Nothing before then.
    At(Instant),
    /// Nothing until memory comes.
    Nothing,
}

/// How every piece of the arena stands.
#[derive(Debug)]
pub(crate) struct Pieces {
    pieces: Vec<Piece>,
    /// Those to be tried, by their time.
    due: BTreeSet<(Instant, usize)>,
    /// None is asked for before then: the kernel had no huge page to give.
    short: Option<Instant>,
    /// When the last attempt ended, and how long it took.
    last: Option<(Instant, Duration)>,
    /// When memory last came.
    came: Option<Instant>,
    huge: usize,
}

impl Pieces {
    /// So many pieces, none of which has memory.
    pub(crate) fn new(pieces: usize) -> Self {
        let piece = Piece {
            backed: 0,
            stage: Stage::Ordinary,
        };
        Self {
            pieces: vec![piece; pieces],
            due: BTreeSet::new(),
            short: None,
            last: None,
            came: None,
            huge: 0,
        }
    }

    /// Bytes that lie in huge pages.
    pub(crate) fn huge_bytes(&self) -> u64 {
        self.huge as u64 * HUGE_PAGE as u64
    }

    /// So many bytes more of the piece around `offset` have memory. Whether it is full now.
    pub(crate) fn gained(&mut self, offset: usize, bytes: usize, now: Instant) -> bool {
        self.came = Some(now);
        let number = offset / HUGE_PAGE;
        let Some(piece) = self.pieces.get_mut(number) else {
            // What lies behind the last whole piece.
            return false;
        };
        piece.backed += bytes;
        self.consider(number, now)
    }

    /// So many bytes of the piece around `offset` have no memory any more: if it was a huge
    /// page, it has been taken apart. Whether it is full all the same.
    pub(crate) fn lost(&mut self, offset: usize, bytes: usize, now: Instant) -> bool {
        let number = offset / HUGE_PAGE;
        let Some(piece) = self.pieces.get_mut(number) else {
            return false;
        };
        piece.backed = piece.backed.saturating_sub(bytes);
        match &mut piece.stage {
            Stage::Tried { disturbed, .. } => *disturbed = true,
            stage => {
                match *stage {
                    Stage::Huge => self.huge -= 1,
                    Stage::Due { at, .. } => {
                        self.due.remove(&(at, number));
                    }
                    _ => {}
                }
                *stage = Stage::Ordinary;
            }
        }
        self.consider(number, now)
    }

    /// Has a piece tried that is full, and of which nothing is known.
    fn consider(&mut self, number: usize, now: Instant) -> bool {
        let piece = &mut self.pieces[number];
        let due = piece.stage == Stage::Ordinary && piece.is_full();
        if due {
            let at = now + PAUSE;
            piece.stage = Stage::Due { at, attempts: 0 };
            self.due.insert((at, number));
        }
        due
    }

    /// Until when the thread rests, as far as is known now.
    fn rests_until(&self, now: Instant) -> Option<Instant> {
        let rest = self.last.map(|(ended, took)| {
            let soon = ended + took * REST;
            match self.came.map(|came| came + QUIET) {
                Some(quiet) if now < quiet => (ended + took * LONG_REST).min(soon.max(quiet)),
                _ => soon,
            }
        });
        rest.max(self.short)
    }

    /// What is to be done now.
    pub(crate) fn next(&mut self, now: Instant) -> Next {
        let Some(&(at, number)) = self.due.first() else {
            return Next::Nothing;
        };
        let at = self.rests_until(now).map_or(at, |rests| rests.max(at));
        if now < at {
            return Next::At(at);
        }
        self.due.pop_first();
        let piece = &mut self.pieces[number];
        let attempts = match piece.stage {
            Stage::Due { attempts, .. } => attempts + 1,
            _ => 1,
        };
        piece.stage = Stage::Tried {
            attempts,
            disturbed: false,
        };
        Next::Try(number)
    }

    /// What came of trying a piece, from `began` on. Whether it was given up because of that.
    pub(crate) fn tried(
        &mut self,
        number: usize,
        result: &io::Result<()>,
        began: Instant,
        now: Instant,
    ) -> bool {
        let piece = &mut self.pieces[number];
        let Stage::Tried {
            attempts,
            disturbed,
        } = piece.stage
        else {
            return false;
        };
        let errno = result.as_ref().err().and_then(Errno::from_io_error);
        self.last = Some((now, now.saturating_duration_since(began)));
        if errno == Some(Errno::NOMEM) {
            self.short = Some(now + SHORTAGE);
        }
        if disturbed {
            piece.stage = Stage::Ordinary;
            self.consider(number, now);
            return false;
        }
        piece.stage = match result {
            Ok(()) => {
                self.huge += 1;
                Stage::Huge
            }
            Err(error) if is_passing(error) && attempts < ATTEMPTS => {
                let at = now + PAUSE * 2_u32.pow(attempts);
                self.due.insert((at, number));
                Stage::Due { at, attempts }
            }
            Err(_) => Stage::GivenUp,
        };
        piece.stage == Stage::GivenUp
    }
}

impl Piece {
    fn is_full(&self) -> bool {
        self.backed + MISSING > HUGE_PAGE
    }
}

/// What the arena, its slots and the thread share.
#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Signalled when a piece is full, and at the end.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    pieces: Pieces,
    closed: bool,
}

impl Shared {
    pub(crate) fn new(pieces: usize) -> Self {
        Self {
            state: Mutex::new(State {
                pieces: Pieces::new(pieces),
                closed: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Pieces::gained`].
    pub(crate) fn gained(&self, offset: usize, bytes: usize) {
        if self.lock().pieces.gained(offset, bytes, Instant::now()) {
            self.changed.notify_one();
        }
    }

    /// As [`Pieces::lost`].
    pub(crate) fn lost(&self, offset: usize, bytes: usize) {
        if self.lock().pieces.lost(offset, bytes, Instant::now()) {
            self.changed.notify_one();
        }
    }

    /// Bytes that lie in huge pages.
    pub(crate) fn huge_bytes(&self) -> u64 {
        self.lock().pieces.huge_bytes()
    }

    /// Ends the thread.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    /// The piece to be tried next, as soon as there is one; `None` at the end.
    fn await_piece(&self) -> Option<usize> {
        let mut state = self.lock();
        while !state.closed {
            let now = Instant::now();
            state = match state.pieces.next(now) {
                Next::Try(piece) => return Some(piece),
                Next::At(at) => {
                    let waited = self.changed.wait_timeout(state, at - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                Next::Nothing => {
                    let waited = self.changed.wait(state);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
        None
    }
}

/// Makes huge pages until the arena is gone, or the kernel says that it makes none.
pub(crate) fn run(shared: &Shared, memory: &HugePages) {
    match HugePages::probe() {
        Err(error) if !is_passing(&error) => {
            tracing::debug!(%error, "this kernel makes no huge pages of the cache's memory");
            return;
        }
        _ => {}
    }
    while let Some(piece) = shared.await_piece() {
        let began = Instant::now();
        let result = memory.collapse(piece);
        let mut state = shared.lock();
        let given_up = state.pieces.tried(piece, &result, began, Instant::now());
        drop(state);
        if let Err(error) = result
            && given_up
        {
            tracing::debug!(piece, %error, "2 MiB of the cache stay in ordinary pages");
        }
    }
}

/// Whether the kernel may do later what it has not done now.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::AGAIN | Errno::BUSY | Errno::NOMEM)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    fn failed(errno: Errno) -> io::Result<()> {
        Err(errno.into())
    }

    /// Fills the piece of this number, slot by slot; whether it is full then.
    fn fill(pieces: &mut Pieces, number: usize, now: Instant) -> bool {
        let slots = HUGE_PAGE / CHUNK_SLOT;
        let gained = |slot| {
            let offset = number * HUGE_PAGE + slot * CHUNK_SLOT;
            pieces.gained(offset, CHUNK_SLOT, now)
        };
        let full: Vec<_> = (0..slots).map(gained).collect();
        assert!(full[..slots - 1].iter().all(|full| !full));
        full[slots - 1]
    }

    /// Fills the first piece, and has it tried with this result.
    fn try_one(pieces: &mut Pieces, result: &io::Result<()>, now: Instant) -> bool {
        assert!(fill(pieces, 0, now));
        assert_eq!(pieces.next(now + PAUSE), Next::Try(0));
        pieces.tried(0, result, now + PAUSE, now + PAUSE)
    }

    #[test]
    fn only_a_full_piece_is_tried_and_not_at_once() {
        let (mut pieces, now) = (Pieces::new(2), Instant::now());
        // All but one slot; and what lies behind the last whole piece.
        for slot in 0..15 {
            assert!(!pieces.gained(slot * CHUNK_SLOT, CHUNK_SLOT, now));
        }
        assert!(!pieces.gained(2 * HUGE_PAGE, HUGE_PAGE, now));
        assert_eq!(pieces.next(now + PAUSE * 100), Next::Nothing);
        // The last holds the end of a layer: a page of a chunk.
        assert!(pieces.gained(15 * CHUNK_SLOT, PAGE, now));
        assert_eq!(pieces.next(now), Next::At(now + PAUSE));
        assert_eq!(pieces.next(now + PAUSE), Next::Try(0));
        assert_eq!(pieces.huge_bytes(), 0);
        assert!(!pieces.tried(0, &Ok(()), now + PAUSE, now + PAUSE));
        assert_eq!(pieces.huge_bytes(), HUGE_PAGE as u64);
        // The rest of that chunk changes nothing.
        assert!(!pieces.gained(15 * CHUNK_SLOT, CHUNK_SLOT - PAGE, now));
        assert_eq!(pieces.next(now + PAUSE * 100), Next::Nothing);
        assert!(fill(&mut pieces, 1, now));
    }

    #[test]
    fn what_passes_is_tried_again_a_few_times() {
        for errno in [Errno::AGAIN, Errno::BUSY, Errno::NOMEM] {
            let (mut pieces, mut now) = (Pieces::new(1), Instant::now());
            assert!(!try_one(&mut pieces, &failed(errno), now));
            now += PAUSE;
            for attempt in 2..=ATTEMPTS {
                let Next::At(at) = pieces.next(now) else {
                    panic!("{errno}: attempt {attempt} comes at once, or never");
                };
                assert_eq!(pieces.next(at), Next::Try(0));
                let given_up = pieces.tried(0, &failed(errno), at, at);
                assert_eq!(given_up, attempt == ATTEMPTS, "{errno}: {attempt}");
                now = at;
            }
            assert_eq!(pieces.next(now + PAUSE * 1000), Next::Nothing);
            assert_eq!(pieces.huge_bytes(), 0);
        }
    }

    #[test]
    fn what_the_kernel_refuses_is_given_up_until_it_has_other_memory() {
        let (mut pieces, now) = (Pieces::new(1), Instant::now());
        assert!(try_one(&mut pieces, &failed(Errno::INVAL), now));
        assert_eq!(pieces.next(now + PAUSE * 1000), Next::Nothing);
        assert!(!pieces.lost(0, CHUNK_SLOT, now));
        assert!(pieces.gained(0, CHUNK_SLOT, now));
    }

    #[test]
    fn without_a_free_huge_page_none_is_asked_for_a_while() {
        let (mut pieces, now) = (Pieces::new(2), Instant::now());
        assert!(fill(&mut pieces, 1, now));
        assert!(!try_one(&mut pieces, &failed(Errno::NOMEM), now));
        let later = now + PAUSE + SHORTAGE;
        assert_eq!(pieces.next(now + PAUSE), Next::At(later));
        assert_eq!(pieces.next(later), Next::Try(1));
    }

    #[test]
    fn after_each_piece_the_thread_rests_four_times_as_long_as_it_took() {
        let (mut pieces, now) = (Pieces::new(2), Instant::now());
        assert!(fill(&mut pieces, 0, now));
        assert!(fill(&mut pieces, 1, now));
        let took = Duration::from_millis(5);
        let began = now + PAUSE;
        assert_eq!(pieces.next(began), Next::Try(0));
        assert!(!pieces.tried(0, &Ok(()), began, began + took));
        let next = began + took * 5;
        assert_eq!(pieces.next(began + took), Next::At(next));
        assert_eq!(pieces.next(next), Next::Try(1));
    }

    #[test]
    fn while_memory_comes_the_thread_rests_much_longer() {
        let (mut pieces, now) = (Pieces::new(4), Instant::now());
        for number in 0..3 {
            assert!(fill(&mut pieces, number, now));
        }
        let took = Duration::from_millis(5);
        let began = now + PAUSE;
        assert_eq!(pieces.next(began), Next::Try(0));
        let ended = began + took;
        assert!(!pieces.tried(0, &Ok(()), began, ended));
        let gain = |pieces: &mut Pieces, at| pieces.gained(3 * HUGE_PAGE, PAGE, at);
        assert!(!gain(&mut pieces, ended));
        let long = ended + took * LONG_REST;
        assert_eq!(pieces.next(ended), Next::At(long));
        assert!(!gain(&mut pieces, ended + took * 50));
        assert_eq!(pieces.next(long - took), Next::At(long));
        assert_eq!(pieces.next(long), Next::Try(1));
        // Quiet comes before the end of that rest, and then it is over.
        let (began, took) = (long, Duration::from_millis(500));
        assert!(!gain(&mut pieces, began));
        let ended = began + took;
        assert!(!pieces.tried(1, &Ok(()), began, ended));
        assert_eq!(pieces.next(ended), Next::At(ended + took * REST));
        assert!(!gain(&mut pieces, ended + took * 3));
        let quiet = ended + took * 3 + QUIET;
        assert_eq!(pieces.next(ended + took * 4), Next::At(quiet));
        assert_eq!(pieces.next(quiet), Next::Try(2));
    }

    #[test]
    fn a_renewed_slot_leaves_ordinary_pages_until_it_has_memory() {
        let (mut pieces, now) = (Pieces::new(2), Instant::now());
        assert!(!try_one(&mut pieces, &Ok(()), now));
        assert!(!pieces.lost(3 * CHUNK_SLOT, CHUNK_SLOT, now));
        assert_eq!(pieces.huge_bytes(), 0);
        assert_eq!(pieces.next(now + PAUSE * 100), Next::Nothing);
        assert!(pieces.gained(3 * CHUNK_SLOT, CHUNK_SLOT, now));
        // One that is due is not tried any more when it is not full.
        assert!(!pieces.lost(0, CHUNK_SLOT, now));
        assert_eq!(pieces.next(now + PAUSE * 100), Next::Nothing);
        // A page of an index leaves a piece full, but not huge.
        assert!(pieces.gained(0, CHUNK_SLOT, now));
        assert_eq!(pieces.next(now + PAUSE), Next::Try(0));
        assert!(!pieces.tried(0, &Ok(()), now, now));
        assert!(pieces.lost(0, PAGE, now));
        assert_eq!(pieces.huge_bytes(), 0);
        assert_eq!(pieces.next(now + PAUSE), Next::Try(0));
    }

    /// Whether the slot was renewed before or after the kernel moved the piece is not known.
    #[test]
    fn a_slot_renewed_while_its_piece_is_tried_has_it_tried_again() {
        let (mut pieces, now) = (Pieces::new(1), Instant::now());
        assert!(fill(&mut pieces, 0, now));
        assert_eq!(pieces.next(now + PAUSE), Next::Try(0));
        assert!(!pieces.lost(0, CHUNK_SLOT, now));
        assert!(!pieces.gained(0, CHUNK_SLOT, now));
        assert!(!pieces.tried(0, &Ok(()), now, now));
        assert_eq!(pieces.huge_bytes(), 0);
        assert_eq!(pieces.next(now + PAUSE), Next::Try(0));
        assert!(!pieces.lost(0, CHUNK_SLOT, now));
        assert!(!pieces.tried(0, &Ok(()), now, now));
        assert_eq!(pieces.next(now + PAUSE * 100), Next::Nothing);
        assert_eq!(pieces.huge_bytes(), 0);
    }
}
