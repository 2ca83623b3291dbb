//! The cache against its promises: bounded, every waiter woken once, hot entries
//! survive a scan, no load is forgotten.

use accel_cache::{Cache, Load, Lookup};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

/// A pool of `capacity` slots that knows how many are out.
struct Pool {
    out: AtomicUsize,
    capacity: usize,
}

struct Slot(Arc<Pool>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.out.fetch_sub(1, SeqCst);
    }
}

type Key = u32;
type Waiter = usize;
type TestCache = Cache<Key, Slot, Waiter, Key>;

fn cache(capacity: usize) -> (Arc<Pool>, TestCache) {
    let pool = Arc::new(Pool {
        out: AtomicUsize::new(0),
        capacity,
    });
    let source = Arc::clone(&pool);
    let take = move || {
        let more = |out| (out < source.capacity).then_some(out + 1);
        let taken = source.out.fetch_update(SeqCst, SeqCst, more);
        taken.ok().map(|_| Slot(Arc::clone(&source)))
    };
    (pool, Cache::new(capacity, take))
}

#[derive(Debug, Clone)]
enum Step {
    Lookup(Key),
    /// End the n-th load in flight, well or not.
    End(usize, bool),
    /// Drop the n-th guard.
    Unpin(usize),
}

#[test]
fn a_trace_finds_its_entry_as_long_as_that_is_there() {
    let (pool, cache) = cache(1);
    let Lookup::Lead(load) = cache.lookup(1, || (0, 1)) else {
        panic!("1 does not lead");
    };
    let (guard, _) = cache.complete(load.key, load.slot, 7);
    let trace = guard.trace();
    drop(guard);
    assert_eq!(trace.follow().map(|guard| guard.len()), Some(7));
    assert!(cache.evict());
    assert!(trace.follow().is_none());
    assert_eq!(pool.out.load(SeqCst), 0, "a trace keeps a slot");
}

/// A pool may owe slots to others before it gives one to the cache.
#[test]
fn a_lone_load_gets_its_slot_however_many_entries_must_go() {
    let (pool, cache) = cache(30);
    for key in 0..30 {
        let Lookup::Lead(load) = cache.lookup(key, || (0, key)) else {
            panic!("{key} does not lead");
        };
        drop(cache.complete(load.key, load.slot, 2));
    }
    // Twenty slots are missing until evictions have made up for them.
    pool.out.fetch_add(20, SeqCst);
    assert!(matches!(
        cache.lookup(30, || (0, 30)),
        Lookup::Lead(load) if load.key == 30
    ));
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u32..12).prop_map(Step::Lookup),
        3 => (any::<usize>(), any::<bool>()).prop_map(|(n, good)| Step::End(n, good)),
        1 => any::<usize>().prop_map(Step::Unpin),
    ];
    proptest::collection::vec(step, 0..200)
}

/// What a user of the cache keeps track of.
struct User {
    pool: Arc<Pool>,
    cache: TestCache,
    loads: Vec<Load<Key, Slot, Key>>,
    guards: Vec<accel_cache::Guard<Slot>>,
    waiting: HashMap<Waiter, Key>,
}

impl User {
    fn lead(&mut self, load: Load<Key, Slot, Key>) {
        assert_eq!(load.key, load.what);
        assert!(
            self.loads.iter().all(|other| other.key != load.key),
            "two flights"
        );
        self.loads.push(load);
    }

    fn pump(&mut self) {
        while let Some(load) = self.cache.next() {
            self.lead(load);
        }
    }

    fn lookup(&mut self, key: Key, waiter: Waiter) {
        let mut made = false;
        let outcome = self.cache.lookup(key, || {
            made = true;
            (waiter, key)
        });
        if made {
            self.waiting.insert(waiter, key);
        }
        match outcome {
            Lookup::Hit(guard) => {
                assert!(!made);
                guard.served(1);
                self.guards.push(guard);
            }
            Lookup::Lead(load) => self.lead(load),
            Lookup::Joined => assert!(made),
        }
    }

    fn end(&mut self, load: Load<Key, Slot, Key>, good: bool) {
        let woken = if good {
            let (guard, woken) = self.cache.complete(load.key, load.slot, 2);
            self.guards.push(guard);
            woken
        } else {
            drop(load.slot);
            self.cache.fail(&load.key)
        };
        assert!(!woken.is_empty(), "a load for nobody");
        for waiter in woken {
            assert_eq!(
                self.waiting.remove(&waiter),
                Some(load.key),
                "woken for another key"
            );
        }
    }
}

proptest! {
    #[test]
    fn bounded_and_every_waiter_woken_once(capacity in 1usize..6, steps in steps()) {
        let (pool, cache) = cache(capacity);
        let (loads, guards) = (Vec::new(), Vec::new());
        let mut user = User { pool, cache, loads, guards, waiting: HashMap::new() };
        for (waiter, step) in steps.into_iter().enumerate() {
            match step {
                Step::Lookup(key) => user.lookup(key, waiter),
                Step::End(n, good) if !user.loads.is_empty() => {
                    let load = user.loads.swap_remove(n % user.loads.len());
                    user.end(load, good);
                }
                Step::Unpin(n) if !user.guards.is_empty() => {
                    drop(user.guards.swap_remove(n % user.guards.len()));
                }
                _ => {}
            }
            user.pump();
            prop_assert!(user.pool.out.load(SeqCst) <= capacity);
            prop_assert!(user.cache.len() <= capacity);
        }
        // Whatever still waits is served once guards and loads are over.
        user.guards.clear();
        user.pump();
        while let Some(load) = user.loads.pop() {
            user.end(load, true);
            user.guards.clear();
            user.pump();
        }
        prop_assert!(user.waiting.is_empty(), "forgotten: {:?}", user.waiting);
        // Every slot that is out belongs to an entry.
        prop_assert_eq!(user.pool.out.load(SeqCst), user.cache.len());
    }
}

/// Reads a key whole: loads it if need be, serves all of its bytes.
fn read(cache: &TestCache, key: Key) -> bool {
    match cache.lookup(key, || (0, key)) {
        Lookup::Hit(guard) => {
            guard.served(guard.len());
            true
        }
        Lookup::Lead(load) => {
            let (guard, _) = cache.complete(load.key, load.slot, 100);
            guard.served(guard.len());
            false
        }
        Lookup::Joined => unreachable!("one thread"),
    }
}

#[test]
fn a_hot_set_survives_a_scan() {
    let (_pool, cache) = cache(1000);
    for _ in 0..3 {
        for key in 0..500 {
            read(&cache, key);
        }
    }
    for key in 10_000..20_000 {
        assert!(!read(&cache, key));
    }
    let kept = (0..500).filter(|&key| read(&cache, key)).count();
    assert!(kept >= 475, "{kept} of 500 are left");
}

#[test]
fn what_was_served_whole_leaves_before_what_was_served_in_part() {
    let (_pool, cache) = cache(100);
    for key in 0..100 {
        let Lookup::Lead(load) = cache.lookup(key, || (0, key)) else {
            panic!("{key} cannot be there");
        };
        let (guard, _) = cache.complete(key, load.slot, 100);
        guard.served(if key < 50 { 10 } else { 100 });
    }
    for key in 1000..1050 {
        read(&cache, key);
    }
    let partly = (0..50).filter(|key| cache.knows(key)).count();
    let whole = (50..100).filter(|key| cache.knows(key)).count();
    assert_eq!((partly, whole), (50, 0));
}

#[test]
fn threads_never_load_a_key_twice_at_once_nor_lose_a_waiter() {
    let (pool, cache) = cache(8);
    let in_flight = Mutex::new(HashSet::new());
    let (waited, woken) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let finish = |load: Load<Key, Slot, Key>| {
        assert!(in_flight.lock().unwrap().insert(load.key), "two flights");
        std::thread::yield_now();
        assert!(in_flight.lock().unwrap().remove(&load.key));
        let waiters = if load.key.is_multiple_of(7) {
            drop(load.slot);
            cache.fail(&load.key)
        } else {
            let (guard, waiters) = cache.complete(load.key, load.slot, 1);
            guard.served(1);
            waiters
        };
        woken.fetch_add(waiters.len(), SeqCst);
    };
    std::thread::scope(|scope| {
        for thread in 0..8u32 {
            let (cache, waited, finish) = (&cache, &waited, &finish);
            scope.spawn(move || {
                let mut state = thread + 1;
                for _ in 0..20_000 {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let key = (state >> 16) % 40;
                    let outcome = cache.lookup(key, || {
                        waited.fetch_add(1, SeqCst);
                        (0, key)
                    });
                    match outcome {
                        Lookup::Hit(guard) => guard.served(1),
                        Lookup::Lead(load) => finish(load),
                        Lookup::Joined => {}
                    }
                    while let Some(load) = cache.next() {
                        finish(load);
                    }
                }
            });
        }
    });
    assert_eq!(waited.load(SeqCst), woken.load(SeqCst));
    assert_eq!(pool.out.load(SeqCst), cache.len());
}
