//! What is done with tasks.

use crate::patience::Patience;
use crate::{LOOK, Output, said, say};
use accel_controller::command::{self, Waiting};
use accel_controller::resource::{AcceleratedImage, AcceleratedImageSpec};
use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use serde::Serialize;

pub(crate) struct Tasks(pub(crate) Api<AcceleratedImage>);

impl Tasks {
    pub(crate) async fn create(
        &self,
        name: &str,
        spec: AcceleratedImageSpec,
        patience: Option<Patience>,
    ) -> Result<()> {
        let task = AcceleratedImage::new(name, spec);
        match self.0.create(&PostParams::default(), &task).await {
            Ok(_) => say(&format!("acceleratedimage {name} created"))?,
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let there = self.0.get(name).await.map_err(said)?;
                if there.spec != task.spec {
                    bail!(
                        "there is a task {name} already, for {}: choose another name with --name",
                        there.spec.source
                    );
                }
                say(&format!("acceleratedimage {name} unchanged"))?;
            }
            Err(error) => return Err(said(error)),
        }
        match patience {
            Some(patience) => self.wait(name, patience).await,
            None => Ok(()),
        }
    }

    async fn wait(&self, name: &str, mut patience: Patience) -> Result<()> {
        // On standard error, and only if that is a terminal.
        let bar = ProgressBar::no_length();
        let style = ProgressStyle::with_template("{spinner} {bar:30} {msg}")?;
        bar.set_style(style);
        bar.enable_steady_tick(LOOK);
        loop {
            let task = self.0.get(name).await.map_err(said)?;
            match command::waiting(&task) {
                Waiting::Done => {
                    bar.finish_and_clear();
                    let target = task.status.map(|status| status.target).unwrap_or_default();
                    return say(&format!("acceleratedimage {name} is ready: {target}"));
                }
                Waiting::Failed(why) => {
                    bar.finish_and_clear();
                    bail!("{name}: {why}");
                }
                Waiting::GoesOn => {}
            }
            let status = task.current().cloned().unwrap_or_default();
            let text = match status.progress {
                Some(progress) => {
                    bar.set_length(progress.bytes);
                    bar.set_position(progress.bytes_done);
                    progress.text
                }
                None => status.message.clone(),
            };
            bar.set_message(text);
            let what = format!("{name} is not ready: {}", status.message);
            patience.pause(&what).await?;
        }
    }

    pub(crate) async fn delete(&self, name: &str, mut patience: Option<Patience>) -> Result<()> {
        let all = self.0.list(&ListParams::default()).await.map_err(said)?;
        let found = command::named(&all.items, name);
        if found.is_empty() {
            bail!("there is no task {name}, and none for an image of that name");
        }
        for task in found {
            let name = task.name_any();
            self.0
                .delete(&name, &DeleteParams::default())
                .await
                .map_err(said)?;
            if let Some(patience) = &mut patience {
                self.wait_gone(&name, task.uid().as_deref(), patience)
                    .await?;
            }
            say(&format!("acceleratedimage {name} deleted"))?;
        }
        Ok(())
    }

    /// Until the task of that name is gone, or another one.
    async fn wait_gone(
        &self,
        name: &str,
        uid: Option<&str>,
        patience: &mut Patience,
    ) -> Result<()> {
        loop {
            match self.0.get_opt(name).await.map_err(said)? {
                Some(there) if there.uid().as_deref() == uid => {
                    let status = there.status.unwrap_or_default();
                    let what = format!("{name} is not gone yet: {}", status.message);
                    patience.pause(&what).await?;
                }
                _ => return Ok(()),
            }
        }
    }

    pub(crate) async fn get(
        &self,
        name: Option<&str>,
        namespaces: bool,
        output: Option<Output>,
    ) -> Result<()> {
        let mut all = self
            .0
            .list(&ListParams::default())
            .await
            .map_err(said)?
            .items;
        if let Some(name) = name {
            let found = command::named(&all, name).into_iter().cloned().collect();
            all = found;
            if all.is_empty() {
                bail!("there is no task {name}, and none for an image of that name");
            }
        }
        for task in &mut all {
            task.metadata.managed_fields = None;
        }
        match output {
            None | Some(Output::Wide) => {
                let wide = output.is_some();
                say(&command::table(&all, namespaces, wide, Timestamp::now()))
            }
            Some(Output::Json) => say(&serde_json::to_string_pretty(&List::new(all))?),
            Some(Output::Yaml) => say(&serde_saphyr::to_string(&List::new(all))?),
        }
    }
}

/// As kubectl prints several objects.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct List {
    api_version: &'static str,
    kind: &'static str,
    items: Vec<AcceleratedImage>,
}

impl List {
    const fn new(items: Vec<AcceleratedImage>) -> Self {
        Self {
            api_version: "v1",
            kind: "List",
            items,
        }
    }
}
