//! Says in the status of tasks which nodes use their images.

use super::{Context, RETRY, RunError, status_patch};
use crate::resource::AcceleratedImage;
use crate::users::{self, UsedBy, Users};
use futures_util::StreamExt as _;
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use kube::runtime::reflector::Store;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::timeout;
use tracing::warn;

/// What the field manager is called: what it writes is nobody else's, so that neither who plans
/// nor this undoes what the other has written meanwhile.
const NAME: &str = "accel-controller-users";
/// How often to look whether something else has to be said: as often as nodes are looked at.
const PAUSE: Duration = Duration::from_secs(3);
/// How long one write may take.
const WRITE: Duration = Duration::from_secs(15);
/// Tasks that are written at a time.
const AT_ONCE: usize = 8;

impl Context {
    pub(super) fn users(&self) -> MutexGuard<'_, Option<Arc<Users>>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says which nodes use what, once that is known; does not end.
    pub(super) async fn tell_users(&self, tasks: Store<AcceleratedImage>) {
        loop {
            let users = self.users().clone();
            let refused = match users {
                Some(users) => self.tell_changes(&tasks.state(), &users).await,
                None => false,
            };
            tokio::time::sleep(if refused { RETRY } else { PAUSE }).await;
        }
    }

    /// Whether the cluster has refused some of it.
    async fn tell_changes(&self, tasks: &[Arc<AcceleratedImage>], users: &Users) -> bool {
        let changes = users::changes(tasks.iter().map(|task| &**task), users);
        let written = futures_util::stream::iter(changes).map(|(task, used)| async move {
            let written = timeout(WRITE, self.write_users(task, &used)).await;
            (task, written.unwrap_or_else(|late| Err(late.into())))
        });
        let mut written = written.buffer_unordered(AT_ONCE);
        let mut refused = None;
        while let Some((task, written)) = written.next().await {
            if let Err(error) = written {
                self.metrics.error();
                refused.get_or_insert((task.name_any(), error));
            }
        }
        if let Some((task, error)) = &refused {
            warn!(task, "cannot say which nodes use it: {error}");
        }
        refused.is_some()
    }

    async fn write_users(&self, task: &AcceleratedImage, used: &UsedBy) -> Result<(), RunError> {
        let apply = PatchParams::apply(NAME).force();
        let patch = Patch::Apply(status_patch(task, used));
        let tasks = self.tasks_beside(task);
        match tasks.patch_status(&task.name_any(), &apply, &patch).await {
            // It is another one by now, or none.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            written => Ok(written.map(drop)?),
        }
    }
}
