//! Whether a controller is at work, for who is none: one that is dead cannot say so itself.

use super::{DURATION, GIVE_UP, NAME, Seen};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use std::fmt;
use std::time::{Duration, Instant};

/// How soon to look again while it is not sure.
const AGAIN: Duration = Duration::from_secs(1);

/// Who leads, as far as can be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leader {
    /// The controller of this name.
    One(String),
    /// Perhaps none: the Lease is old by the clock of this machine, which may be wrong, or was
    /// given up and may be taken by another one.
    Unsure,
    /// None, since this time by the clock of the last one, if there was any.
    None(Option<Timestamp>),
}

impl fmt::Display for Leader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(name) => write!(f, "controller: {name} leads"),
            Self::Unsure => write!(f, "controller: has not been heard yet"),
            Self::None(Some(since)) => {
                // Whole seconds.
                let since = Timestamp::from_second(since.as_second()).unwrap_or(*since);
                write!(f, "controller: not running since {since}")
            }
            Self::None(None) => write!(
                f,
                "controller: not running: none has ever led in that namespace"
            ),
        }
    }
}

/// Listens to the leader's Lease.
#[derive(Debug)]
pub struct Ear {
    leases: Api<Lease>,
    heard: Heard,
}

impl Ear {
    /// `leases`: those of the controller's namespace.
    pub fn new(leases: Api<Lease>) -> Self {
        Self {
            leases,
            heard: Heard::default(),
        }
    }

    /// What can be told at once.
    ///
    /// # Errors
    /// The cluster does not say, or not to this user.
    pub async fn listen(&mut self) -> Result<Leader, kube::Error> {
        let lease = self.leases.get_opt(NAME).await?;
        let (wall, now) = (Timestamp::now(), Instant::now());
        Ok(self.heard.hear(lease.as_ref(), wall, now))
    }

    /// Listens until it is sure: at once if a controller has said something a moment ago, and for
    /// as long as one may be silent (10 s) otherwise.
    ///
    /// # Errors
    /// As [`Ear::listen`].
    pub async fn ask(&mut self) -> Result<Leader, kube::Error> {
        loop {
            match self.listen().await? {
                Leader::Unsure => tokio::time::sleep(AGAIN).await,
                leader => return Ok(leader),
            }
        }
    }
}

/// What was heard so far.
#[derive(Debug, Default)]
struct Heard(Seen);

impl Heard {
    /// `wall`: the time by the clock of this machine, which is believed if it says that the Lease
    /// was renewed a moment ago. That it is old is believed when it is not renewed before our
    /// eyes.
    fn hear(&mut self, lease: Option<&Lease>, wall: Timestamp, now: Instant) -> Leader {
        let Some(spec) = lease.and_then(|lease| lease.spec.as_ref()) else {
            *self = Self::default();
            return Leader::None(None);
        };
        let sight = self.0.look(spec, now);
        // Whoever leads would have ended by then.
        let silent = now.duration_since(sight.since) > GIVE_UP;
        let renewed = spec.renew_time.as_ref().map(|renewed| renewed.0);
        let is_fresh = renewed.is_some_and(|renewed| {
            let age = wall.duration_since(renewed).unsigned_abs();
            age <= DURATION
        });
        match &sight.holder {
            _ if silent => Leader::None(renewed),
            Some(name) if sight.renewed_since || is_fresh => Leader::One(name.clone()),
            _ => Leader::Unsure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lead::held;
    use k8s_openapi::api::coordination::v1::LeaseSpec;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn lease(holder: &str, second: i64) -> Lease {
        Lease {
            spec: Some(LeaseSpec {
                renew_time: Some(MicroTime(at(second))),
                ..held(holder, LeaseSpec::default())
            }),
            ..Lease::default()
        }
    }

    /// What is heard of these leases, a second apart; `skew` is how far the local clock is ahead.
    fn heard(skew: i64, leases: &[Lease]) -> Vec<Leader> {
        let (mut heard, start) = (Heard::default(), Instant::now());
        let all = leases.iter().zip(0..).map(|(lease, second)| {
            let now = start + Duration::from_secs(second);
            let wall = at(1000 + skew + i64::try_from(second).unwrap());
            heard.hear(Some(lease), wall, now)
        });
        all.collect()
    }

    #[test]
    fn a_leader_that_says_something_is_heard_whatever_the_clock_says() {
        let one = || Leader::One("one".to_owned());
        // At once, as it has said something a moment ago.
        assert_eq!(heard(0, &[lease("one", 990)]), [one()]);
        // The clock is off by an hour: with the next thing that it says.
        for skew in [-3600, 3600] {
            let all = [lease("one", 999), lease("one", 999), lease("one", 1002)];
            assert_eq!(heard(skew, &all), [Leader::Unsure, Leader::Unsure, one()]);
        }
        // Another one goes on.
        let two = Leader::One("two".to_owned());
        let all = [lease("one", 999), lease("", 1001), lease("two", 1002)];
        assert_eq!(heard(0, &all), [one(), Leader::Unsure, two]);
    }

    #[test]
    fn none_runs_when_nothing_is_said_for_longer_than_one_can_lead_so() {
        let seconds = usize::try_from(GIVE_UP.as_secs()).unwrap() + 2;
        for (lease, first) in [
            // It has died long ago, or just now; or it has ended in order.
            (lease("one", 5), Leader::Unsure),
            (lease("one", 1000), Leader::One("one".to_owned())),
            (lease("", 1000), Leader::Unsure),
        ] {
            let all = heard(0, &vec![lease.clone(); seconds]);
            let (last, before) = all.split_last().unwrap();
            assert!(before.iter().all(|heard| *heard == first), "{all:?}");
            let renewed = lease.spec.unwrap().renew_time.unwrap().0;
            assert_eq!(*last, Leader::None(Some(renewed)));
        }
        // There was never one.
        let never = Heard::default().hear(None, at(0), Instant::now());
        assert_eq!(never, Leader::None(None));
    }

    #[test]
    fn it_is_said_in_words() {
        let since = Timestamp::from_millisecond(1_500).unwrap();
        for (leader, words) in [
            (Leader::One("a-1".to_owned()), "controller: a-1 leads"),
            (
                Leader::None(None),
                "controller: not running: none has ever led in that namespace",
            ),
            (
                Leader::None(Some(since)),
                "controller: not running since 1970-01-01T00:00:01Z",
            ),
        ] {
            assert_eq!(leader.to_string(), words);
        }
    }
}
