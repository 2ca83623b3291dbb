//! Waiting for something, and listening meanwhile whether a controller does it.

use crate::LOOK;
use accel_controller::lead::{Ear, Leader};
use anyhow::{Result, bail};
use std::io::Write as _;
use std::time::{Duration, Instant};

/// How often to listen.
const LISTEN: Duration = Duration::from_secs(2);

/// For how long something is waited for, and what is known of who does it.
pub(crate) struct Patience {
    /// None: for ever.
    deadline: Option<Instant>,
    /// None if the cluster does not tell this user who leads: then that is not known.
    ear: Option<Ear>,
    heard: Option<(Leader, Instant)>,
    /// Whether it was told that none does.
    told: bool,
}

impl Patience {
    pub(crate) const fn new(deadline: Option<Instant>, ear: Ear) -> Self {
        Self {
            deadline,
            ear: Some(ear),
            heard: None,
            told: false,
        }
    }

    fn is_over(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Who leads, if that can be known; when none does any more, or one does again, it is told.
    async fn listen(&mut self) -> Option<&Leader> {
        let heard = self.heard.as_ref();
        let due = heard.is_none_or(|(_, at)| at.elapsed() >= LISTEN);
        if let Some(ear) = self.ear.as_mut().filter(|_| due) {
            match ear.listen().await {
                Ok(leader) => {
                    let runs_not = matches!(leader, Leader::None(_));
                    if runs_not != self.told && leader != Leader::Unsure {
                        let _ = writeln!(std::io::stderr(), "{leader}");
                        self.told = runs_not;
                    }
                    self.heard = Some((leader, Instant::now()));
                }
                // Whoever is let to do something here need not be let to see that.
                Err(kube::Error::Api(status)) if matches!(status.code, 401 | 403) => {
                    self.ear = None;
                }
                Err(_) => {}
            }
        }
        self.heard.as_ref().map(|(leader, _)| leader)
    }

    /// Whether what is said by the controller may be long over, because none runs.
    pub(crate) async fn is_unattended(&mut self) -> bool {
        let leader = self.listen().await;
        leader.is_some_and(|leader| !matches!(leader, Leader::One(_)))
    }

    /// That no controller works, if that is so, to be put behind what is waited for.
    async fn hint(&mut self) -> String {
        let leader = self.listen().await;
        let leader = leader.filter(|leader| matches!(leader, Leader::None(_)));
        leader.map_or_else(String::new, |leader| format!(" ({leader})"))
    }

    /// Waits a little, or fails with `what` when it is too late.
    pub(crate) async fn pause(&mut self, what: &str) -> Result<()> {
        self.pause_or(what, "; it has not been waited for any longer, and goes on")
            .await
    }

    /// The same for something that ends with that.
    pub(crate) async fn pause_or_end(&mut self, what: &str) -> Result<()> {
        self.pause_or(what, "").await
    }

    async fn pause_or(&mut self, what: &str, then: &str) -> Result<()> {
        let hint = self.hint().await;
        if self.is_over() {
            bail!("{what}{hint}{then}");
        }
        tokio::time::sleep(LOOK).await;
        Ok(())
    }
}
