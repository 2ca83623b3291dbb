//! The cache under many interleavings of its threads, every step of them chosen by
//! shuttle: every waiter is woken once, no key is loaded twice at a time, no load is
//! forgotten when memory is short, nothing deadlocks (which shuttle reports).

#[path = "../src/lib.rs"]
#[allow(dead_code, unused_imports, unreachable_pub)]
mod cache;

/// What the included source finds as `crate::sync`.
mod sync {
    pub(crate) use shuttle::sync::{Arc, Mutex, MutexGuard, Weak, atomic};
    pub(crate) use std::sync::PoisonError;
}

use cache::{Cache, Load, Lookup};
use shuttle::thread;
use std::collections::HashSet;
use sync::atomic::{AtomicUsize, Ordering::SeqCst};
use sync::{Arc, Mutex};

/// How many interleavings each model tries.
const TRIES: usize = 2000;

struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

type Key = u32;
type TestCache = Cache<Key, Slot, usize, Key>;

/// A cache, and what its users know of it.
struct World {
    cache: TestCache,
    /// Slots that are out.
    out: Arc<AtomicUsize>,
    flying: Mutex<HashSet<Key>>,
    loads: AtomicUsize,
    waited: AtomicUsize,
    woken: AtomicUsize,
    hits: AtomicUsize,
}

impl World {
    fn new(capacity: usize) -> Arc<Self> {
        let out = Arc::new(AtomicUsize::new(0));
        let slots = Arc::clone(&out);
        let take = move || {
            let more = |out| (out < capacity).then_some(out + 1);
            let taken = slots.fetch_update(SeqCst, SeqCst, more);
            taken.ok().map(|_| Slot(Arc::clone(&slots)))
        };
        Arc::new(Self {
            cache: Cache::new(capacity, take),
            out,
            flying: Mutex::new(HashSet::new()),
            loads: AtomicUsize::new(0),
            waited: AtomicUsize::new(0),
            woken: AtomicUsize::new(0),
            hits: AtomicUsize::new(0),
        })
    }

    /// Looks a key up as a queue thread does; loads what there is to load.
    fn read(&self, key: Key, good: bool) {
        let outcome = self.cache.lookup(key, || {
            self.waited.fetch_add(1, SeqCst);
            (0, key)
        });
        // As the engine does: a slot may be free after a guard or a load was dropped,
        // and only then is the queue looked at.
        match outcome {
            Lookup::Hit(guard) => {
                self.hits.fetch_add(1, SeqCst);
                guard.served(1);
                drop(guard);
                self.start_waiting(good);
            }
            Lookup::Lead(load) => {
                self.load(load, good);
                self.start_waiting(good);
            }
            Lookup::Joined => {}
        }
    }

    fn start_waiting(&self, good: bool) {
        while let Some(load) = self.cache.next() {
            self.load(load, good);
        }
    }

    fn load(&self, load: Load<Key, Slot, Key>, good: bool) {
        let Load { key, slot, .. } = load;
        self.loads.fetch_add(1, SeqCst);
        assert!(
            self.flying.lock().unwrap().insert(key),
            "two flights of {key}"
        );
        thread::yield_now();
        assert!(self.flying.lock().unwrap().remove(&key));
        let woken = if good {
            let (guard, woken) = self.cache.complete(key, slot, 1);
            guard.served(1);
            woken
        } else {
            drop(slot);
            self.cache.fail(&key)
        };
        assert!(!woken.is_empty(), "a load for nobody");
        self.woken.fetch_add(woken.len(), SeqCst);
    }

    fn check(&self) {
        assert_eq!(
            self.waited.load(SeqCst),
            self.woken.load(SeqCst),
            "forgotten"
        );
        assert_eq!(
            self.cache.queued(),
            0,
            "loads wait and nothing is under way"
        );
        assert_eq!(self.out.load(SeqCst), self.cache.len(), "a slot leaks");
    }
}

fn threads(world: &Arc<World>, reads: &'static [&'static [(Key, bool)]]) {
    let all: Vec<_> = reads
        .iter()
        .map(|reads| {
            let world = Arc::clone(world);
            thread::spawn(move || {
                for &(key, good) in *reads {
                    world.read(key, good);
                }
            })
        })
        .collect();
    for one in all {
        one.join().unwrap();
    }
}

#[test]
fn readers_of_one_missing_key_cause_one_load() {
    let model = || {
        let world = World::new(4);
        threads(&world, &[&[(1, true)], &[(1, true)], &[(1, true)]]);
        world.check();
        assert_eq!(world.loads.load(SeqCst), 1);
        let counted = world.hits.load(SeqCst) + world.waited.load(SeqCst);
        assert_eq!(counted, 3);
    };
    shuttle::check_random(model, TRIES);
    shuttle::check_pct(model, TRIES, 3);
}

#[test]
fn loads_that_find_no_memory_are_not_forgotten() {
    let model = || {
        let world = World::new(1);
        threads(
            &world,
            &[
                &[(1, true), (2, true)],
                &[(2, true), (3, true)],
                &[(3, true), (1, true)],
            ],
        );
        world.check();
    };
    shuttle::check_random(model, TRIES);
    shuttle::check_pct(model, TRIES, 3);
}

#[test]
fn failed_loads_wake_who_waits_and_are_tried_anew() {
    let model = || {
        let world = World::new(1);
        threads(
            &world,
            &[
                &[(1, false), (1, true)],
                &[(1, true), (2, false)],
                &[(2, true)],
            ],
        );
        world.check();
    };
    shuttle::check_random(model, TRIES);
    shuttle::check_pct(model, TRIES, 3);
}

#[test]
fn evictions_for_others_lose_nothing() {
    let model = || {
        let world = World::new(2);
        let evicting = Arc::clone(&world);
        // As reads that are repeated elsewhere do.
        let evictor = thread::spawn(move || {
            for _ in 0..3 {
                evicting.cache.evict();
                while let Some(load) = evicting.cache.next() {
                    evicting.load(load, true);
                }
            }
        });
        threads(
            &world,
            &[&[(1, true), (2, true), (3, true)], &[(3, true), (1, true)]],
        );
        evictor.join().unwrap();
        world.check();
    };
    shuttle::check_random(model, TRIES);
}
