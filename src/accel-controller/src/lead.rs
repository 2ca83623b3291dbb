//! One controller at a time: whoever holds the Lease.

mod ear;

pub use self::ear::{Ear, Leader};
use anyhow::{Context as _, bail};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// The Lease's name.
pub const NAME: &str = "accel-controller";

/// How long a holder that says nothing is waited for.
const DURATION: Duration = Duration::from_secs(15);
/// How often the holder says something.
const RENEW: Duration = Duration::from_secs(3);
/// A holder that could not renew it for so long must not go on: soon another begins.
const GIVE_UP: Duration = Duration::from_secs(10);
/// How often others look.
const LOOK: Duration = Duration::from_secs(2);

/// A candidate.
#[derive(Debug)]
pub struct Candidate {
    /// The Leases of the controller's namespace.
    pub leases: Api<Lease>,
    /// What this process is called: nobody else may have that name.
    pub identity: String,
}

/// What others said of the Lease when, by the clock of this process: clocks of machines
/// differ.
#[derive(Debug, Default)]
struct Seen(Option<Sight>);

#[derive(Debug, Clone)]
struct Sight {
    holder: Option<String>,
    renewed: Option<MicroTime>,
    /// Since when it has been that.
    since: Instant,
    /// Whether it was something else when it was first seen.
    renewed_since: bool,
}

impl Seen {
    fn look(&mut self, spec: &LeaseSpec, now: Instant) -> Sight {
        let holder = spec.holder_identity.clone().filter(|name| !name.is_empty());
        match &self.0 {
            Some(sight) if sight.holder == holder && sight.renewed == spec.renew_time => {
                sight.clone()
            }
            before => {
                let sight = Sight {
                    holder,
                    renewed: spec.renew_time.clone(),
                    since: now,
                    renewed_since: before.is_some(),
                };
                self.0.insert(sight).clone()
            }
        }
    }

    /// Whether the holder has been silent for too long.
    fn is_over(&mut self, spec: &LeaseSpec, now: Instant) -> bool {
        let sight = self.look(spec, now);
        let term = spec.lease_duration_seconds.map_or(DURATION, |seconds| {
            Duration::from_secs(seconds.max(1).unsigned_abs().into())
        });
        sight.holder.is_none() || now.duration_since(sight.since) > term
    }
}

impl Candidate {
    /// Returns when this process leads.
    ///
    /// # Errors
    /// If the cluster does not let it have the Lease; not if the cluster is away.
    pub async fn lead(&self) -> anyhow::Result<()> {
        let mut seen = Seen::default();
        let mut told = None;
        loop {
            let tried = self.try_to_lead(&mut seen, &mut told);
            // One that does not answer is away, too.
            if let Ok(leads) = tokio::time::timeout(GIVE_UP, tried).await
                && leads?
            {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether this process leads now. `told` is whom it has last been told of.
    async fn try_to_lead(
        &self,
        seen: &mut Seen,
        told: &mut Option<String>,
    ) -> anyhow::Result<bool> {
        let plain = PostParams::default();
        let taken = match self.leases.get_opt(NAME).await {
            Ok(None) => self.leases.create(&plain, &self.new_lease()).await,
            Ok(Some(lease)) => {
                let spec = lease.spec.clone().unwrap_or_default();
                if !seen.is_over(&spec, Instant::now()) {
                    if *told != spec.holder_identity {
                        info!(leader = spec.holder_identity, "another controller leads");
                        *told = spec.holder_identity;
                    }
                    return Ok(false);
                }
                self.replace(lease, &self.identity).await
            }
            Err(error) => Err(error),
        };
        match taken {
            Ok(_) => Ok(true),
            Err(error) => refused_for_good(error).map(|()| false),
        }
    }

    /// Keeps the Lease. Returns only when it is lost: then everything has to end.
    pub async fn keep(&self) -> anyhow::Error {
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(RENEW).await;
            // On a busy machine an answer may take most of that.
            let left = GIVE_UP.saturating_sub(renewed.elapsed());
            let began = Instant::now();
            match tokio::time::timeout(left, self.renew()).await {
                // The Lease has the time from before it was sent.
                Ok(Ok(())) => renewed = began,
                Ok(Err(error)) if error.is::<Lost>() => return error,
                Ok(Err(error)) => warn!("the Lease cannot be renewed: {error:#}"),
                Err(_) => warn!("the Lease cannot be renewed: the cluster does not answer"),
            }
            if renewed.elapsed() > GIVE_UP {
                return anyhow::anyhow!("the Lease could not be renewed in time");
            }
        }
    }

    async fn renew(&self) -> anyhow::Result<()> {
        let lease = self.leases.get(NAME).await?;
        let holder = lease
            .spec
            .as_ref()
            .and_then(|spec| spec.holder_identity.as_deref());
        if holder != Some(&self.identity) {
            bail!(Lost);
        }
        self.replace(lease, &self.identity).await?;
        Ok(())
    }

    /// Lets the next one lead at once.
    pub async fn give_up(&self) {
        let released = async {
            let lease = self.leases.get(NAME).await?;
            let holder = lease
                .spec
                .as_ref()
                .and_then(|spec| spec.holder_identity.as_deref());
            if holder == Some(&self.identity) {
                self.replace(lease, "").await?;
            }
            Ok::<_, kube::Error>(())
        };
        if let Ok(Err(error)) = tokio::time::timeout(RENEW, released).await {
            warn!("the Lease cannot be given up: {error}");
        }
    }

    fn new_lease(&self) -> Lease {
        Lease {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                ..ObjectMeta::default()
            },
            spec: Some(held(&self.identity, LeaseSpec::default())),
        }
    }

    /// Fails if anybody changed it since it was read.
    async fn replace(&self, mut lease: Lease, holder: &str) -> Result<Lease, kube::Error> {
        lease.spec = Some(held(holder, lease.spec.unwrap_or_default()));
        lease.metadata.managed_fields = None;
        self.leases
            .replace(NAME, &PostParams::default(), &lease)
            .await
    }
}

/// Another process holds it.
#[derive(Debug, thiserror::Error)]
#[error("another controller leads now")]
struct Lost;

fn held(holder: &str, before: LeaseSpec) -> LeaseSpec {
    let now = MicroTime(Timestamp::now());
    let same = before.holder_identity.as_deref() == Some(holder);
    let changes = before.lease_transitions.unwrap_or_default();
    LeaseSpec {
        holder_identity: Some(holder.to_owned()),
        lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
        acquire_time: match same {
            true => before.acquire_time.clone(),
            false => Some(now.clone()),
        },
        renew_time: Some(now),
        lease_transitions: Some(changes.saturating_add(i32::from(!same && !holder.is_empty()))),
        ..before
    }
}

/// Somebody else may have been faster, and a cluster may be away for a while.
fn refused_for_good(error: kube::Error) -> anyhow::Result<()> {
    match &error {
        kube::Error::Api(status) if matches!(status.code, 401 | 403) => {
            Err(error).context("the controller may not use its Lease")
        }
        kube::Error::Api(status) if status.code == 409 => Ok(()),
        _ => {
            warn!("the Lease cannot be had: {error}");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_is_over_when_it_was_silent_for_its_term_by_our_own_clock() {
        let start = Instant::now();
        let after = |seconds| start.checked_add(Duration::from_secs(seconds)).unwrap();
        // Its clock is far off.
        let at = |second| MicroTime(Timestamp::from_second(second).unwrap());
        let spec = |second| LeaseSpec {
            renew_time: Some(at(second)),
            ..held("one", LeaseSpec::default())
        };
        let mut seen = Seen::default();
        assert!(!seen.is_over(&spec(5), start));
        assert!(!seen.is_over(&spec(5), after(15)));
        assert!(!seen.is_over(&spec(6), after(16)));
        assert!(!seen.is_over(&spec(6), after(31)));
        assert!(seen.is_over(&spec(6), after(32)));
    }

    #[test]
    fn one_that_was_given_up_is_free_at_once() {
        let given_up = held("", held("one", LeaseSpec::default()));
        assert!(Seen::default().is_over(&given_up, Instant::now()));
        assert_eq!(held("two", given_up).lease_transitions, Some(2));
    }
}
