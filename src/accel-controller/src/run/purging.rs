//! Takes the steps of [`crate::purge`].

use super::{Context, RunError};
use crate::obstacles::CONTROLLER_READY;
use crate::plan;
use crate::purge::{self, Step};
use crate::resource::{AcceleratedImage, ImageAcceleration};
use crate::service;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::controller::Action;
use std::time::Duration;
use tracing::info;

/// How often to look whether all that was made is gone.
const PAUSE: Duration = Duration::from_secs(2);

impl Context {
    /// Sees to it that a service stays, once it is deleted, exactly if something has to go
    /// with it.
    pub(super) async fn keep_for_purge(&self, service: &ImageAcceleration) -> Result<(), RunError> {
        for step in purge::plan(service, &[]) {
            self.take(service, &step).await?;
        }
        Ok(())
    }

    /// The service is deleted.
    pub(super) async fn purge(&self, service: &ImageAcceleration) -> Result<Action, RunError> {
        let tasks = self.tasks().await?;
        let steps = purge::plan(service, &tasks);
        if !steps.contains(&Step::RemoveFinalizer) {
            let mut status = service.status.clone().unwrap_or_default();
            let now = Timestamp::now();
            purge::tell(&mut status, service, &tasks, now);
            service::say(
                &mut status,
                service,
                CONTROLLER_READY,
                &self.controller(),
                now,
            );
            self.write_service(service, &status).await?;
        }
        for step in &steps {
            self.take(service, step).await?;
        }
        Ok(Action::requeue(PAUSE))
    }

    /// What changes meanwhile is looked at again.
    async fn take(&self, service: &ImageAcceleration, step: &Step) -> Result<(), RunError> {
        let taken = match step {
            Step::AddFinalizer | Step::RemoveFinalizer => {
                // Whoever has just asked for a purge would not get it if this were of an older
                // version.
                let keep = *step == Step::AddFinalizer;
                let patch = Patch::Merge(plan::finalizer(&service.metadata, keep));
                let services = self.all::<ImageAcceleration>();
                let (name, plain) = (service.name_any(), PatchParams::default());
                services.patch(&name, &plain, &patch).await.map(drop)
            }
            Step::Delete {
                namespace,
                name,
                uid,
            } => {
                info!(
                    task = name,
                    namespace, "is deleted with all that it has made"
                );
                let tasks = Api::<AcceleratedImage>::namespaced(self.client.clone(), namespace);
                let only = DeleteParams::default().preconditions(Preconditions {
                    uid: uid.clone(),
                    resource_version: None,
                });
                tasks.delete(name, &only).await.map(drop)
            }
        };
        match taken {
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            taken => Ok(taken?),
        }
    }
}
