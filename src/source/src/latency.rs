//! How long things took: a histogram that costs two atomic additions a time.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds of the buckets, microseconds; one more takes what is longer.
pub const BOUNDS: [u64; 20] = [
    10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000,
    500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000, 30_000_000,
];

const BUCKETS: usize = BOUNDS.len() + 1;

/// A histogram of durations.
#[derive(Default)]
pub struct Latency {
    buckets: [AtomicU64; BUCKETS],
    nanoseconds: AtomicU64,
}

impl Latency {
    /// Notes one.
    pub fn record(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let at = BOUNDS.partition_point(|&bound| bound.saturating_mul(1000) < nanoseconds);
        self.buckets[at].fetch_add(1, Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Relaxed);
    }

    /// What was noted so far.
    pub fn snapshot(&self) -> Latencies {
        let mut snapshot = Latencies {
            nanoseconds: self.nanoseconds.load(Relaxed),
            ..Latencies::default()
        };
        for (count, bucket) in snapshot.counts.iter_mut().zip(&self.buckets) {
            *count = bucket.load(Relaxed);
        }
        snapshot
    }
}

impl fmt::Debug for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.snapshot().fmt(f)
    }
}

/// A histogram at some moment.
#[derive(Debug, Clone, Default)]
pub struct Latencies {
    /// How many lay in each bucket: above the bound before, up to the bucket's own.
    pub counts: [u64; BUCKETS],
    /// All of them together, nanoseconds.
    pub nanoseconds: u64,
}

impl Latencies {
    /// How many there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Adds another.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.nanoseconds += other.nanoseconds;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_lies_in_the_bucket_whose_bound_it_does_not_exceed() {
        let latency = Latency::default();
        let times = [0, 10_000, 10_001, 1_000_000, 30_000_000_000, 30_000_000_001];
        for nanoseconds in times {
            latency.record(Duration::from_nanos(nanoseconds));
        }
        let mut all = latency.snapshot();
        let filled = |all: &Latencies| -> Vec<(usize, u64)> {
            let counts = all.counts.iter().copied().enumerate();
            counts.filter(|(_, count)| *count > 0).collect()
        };
        assert_eq!(filled(&all), [(0, 2), (1, 1), (6, 1), (19, 1), (20, 1)]);
        assert_eq!(all.nanoseconds, times.iter().sum::<u64>());
        all.add(&latency.snapshot());
        assert_eq!(all.count(), 12);
    }
}
