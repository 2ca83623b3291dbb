//! Secrets of tasks, and Jobs that try UFS and ask registries whether they take logins.

use super::{Context, RETRY, RunError};
use crate::check::{self, Checked, Checking, FAILED_MOUNT, Step};
use crate::job::{self, CHECK};
use crate::login::{self, SECRET_KEY, Secret};
use crate::resource::{AcceleratedImage, ImageAcceleration};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{self, Event, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::{Api, ListParams, PostParams};
use std::time::Duration;
use tracing::warn;

impl Context {
    fn secret_of(&self, task: &AcceleratedImage) -> Option<(Api<v1::Secret>, String)> {
        let name = task.spec.secret_name.clone()?;
        let namespace = task.namespace().unwrap_or_default();
        Some((Api::namespaced(self.client.clone(), &namespace), name))
    }

    /// How it is with the Secret that a task names. What is in it is not kept.
    pub(super) async fn secret(&self, task: &AcceleratedImage) -> Result<Secret, RunError> {
        let Some((secrets, name)) = self.secret_of(task) else {
            return Ok(Secret::Unnamed);
        };
        match secrets.get_opt(&name).await {
            Ok(Some(secret)) => {
                let data = secret.data.unwrap_or_default();
                Ok(match data.contains_key(SECRET_KEY) {
                    true => Secret::There,
                    false => Secret::OtherType,
                })
            }
            Ok(None) => Ok(Secret::Missing),
            Err(kube::Error::Api(status)) if status.code == 403 => Ok(Secret::Forbidden),
            Err(error) => Err(error.into()),
        }
    }

    /// Copies the task's Secret for a Job, with which it goes.
    pub(super) async fn lend(
        &self,
        task: &AcceleratedImage,
        job: &str,
        uid: &str,
    ) -> Result<(), kube::Error> {
        let Some((secrets, name)) = self.secret_of(task) else {
            return Ok(());
        };
        let Some(secret) = secrets.get_opt(&name).await? else {
            // That is told with the next look, and ends the Job.
            return Ok(());
        };
        let owner = OwnerReference {
            api_version: "batch/v1".to_owned(),
            kind: "Job".to_owned(),
            name: job.to_owned(),
            uid: uid.to_owned(),
            ..OwnerReference::default()
        };
        let copy = login::copy(secret, owner);
        let copies = self.own::<v1::Secret>();
        match copies.create(&PostParams::default(), &copy).await {
            // From when it was looked last.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            made => made.map(drop),
        }
    }

    /// Observes and plans how to go on with trying what the service names.
    pub(super) async fn look_at_check(
        &self,
        service: &ImageAcceleration,
    ) -> Result<Checked, RunError> {
        let of_checks = ListParams::default().labels(&job::selector(CHECK));
        let jobs = self.own::<Job>().list(&of_checks).await?.items;
        let (pod, log) = self.newest_pod(&jobs).await?;
        let events = match (&pod, &log) {
            (Some(pod), None) => self.failed_mounts(pod).await?,
            _ => Vec::new(),
        };
        let (looked, trouble) = (self.looked().clone(), self.trouble().clone());
        Ok(check::check(&Checking {
            service,
            jobs: &jobs,
            pod: pod.as_ref(),
            log,
            events: &events,
            nodes: looked.as_ref().map(|looked| &looked.ufs),
            trouble: trouble.as_ref(),
            settings: &self.settings,
            now: Timestamp::now(),
        }))
    }

    /// What its node says of a pod whose volumes it cannot mount.
    async fn failed_mounts(&self, pod: &Pod) -> Result<Vec<Event>, RunError> {
        let uid = pod.uid().unwrap_or_default();
        let fields = format!("involvedObject.uid={uid},reason={FAILED_MOUNT}");
        let of_pod = ListParams::default().fields(&fields);
        match self.own::<Event>().list(&of_pod).await {
            Ok(events) => Ok(events.items),
            // Grants of an older version: why is not known then, all the rest is.
            Err(kube::Error::Api(refusal)) if refusal.code == 403 => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Does what was planned. How long to wait for the next look.
    pub(super) async fn go_on_with_check(&self, checked: &Checked) -> Option<Duration> {
        for step in &checked.steps {
            let done = match step {
                Step::Run(job) => self.run_job(job).await.map(drop),
                Step::Stop(name) => self.stop_job(name).await,
            };
            if let Err(error) = done {
                self.metrics.error();
                warn!("UFS and logins cannot be tried: {error}");
                return Some(RETRY);
            }
        }
        checked.again
    }
}
