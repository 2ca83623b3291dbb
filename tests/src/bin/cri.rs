//! `cri pull|remove IMAGE`: what a kubelet asks of containerd about images.

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use std::path::PathBuf;

#[allow(missing_debug_implementations, clippy::semicolon_if_nothing_returned)]
mod api {
    tonic::include_proto!("runtime.v1");
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Action {
    Pull,
    Remove,
}

/// Pulls or removes an image over the container runtime interface
#[derive(Debug, Parser)]
struct Arguments {
    action: Action,
    /// HOST/REPO:TAG
    image: String,
    /// containerd's socket
    #[arg(long, value_name = "PATH")]
    address: PathBuf,
    /// As of a pod with this runtime class
    #[arg(long, value_name = "NAME", default_value = "")]
    runtime_handler: String,
    /// Say so in the pod's annotations, where containerd 1.7 looks
    #[arg(long)]
    handler_in_annotation: bool,
}

/// Where containerd 1.7 looks for the runtime handler of a pull.
const HANDLER: &str = "io.containerd.cri.runtime-handler";

async fn run(arguments: Arguments) -> Result<()> {
    let socket = arguments.address;
    let what = format!("cannot reach containerd at {}", socket.display());
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move {
            let stream = tokio::net::UnixStream::connect(socket).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://socket");
    let channel = endpoint
        .connect_with_connector(connector)
        .await
        .context(what)?;
    let mut client = api::image_service_client::ImageServiceClient::new(channel);
    let handler = arguments.runtime_handler;
    let (field, annotation) = match arguments.handler_in_annotation {
        true => (String::new(), Some((HANDLER.to_owned(), handler))),
        false => (handler, None),
    };
    let image = Some(api::ImageSpec {
        image: arguments.image,
        runtime_handler: field,
        ..api::ImageSpec::default()
    });
    // A kubelet always sends one; containerd looks at no handler without.
    let sandbox_config = Some(api::PodSandboxConfig {
        annotations: annotation.into_iter().collect(),
    });
    match arguments.action {
        Action::Pull => {
            let request = api::PullImageRequest {
                image,
                sandbox_config,
            };
            let pulled = client.pull_image(request).await;
            let pulled = pulled.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
            println!("{}", pulled.into_inner().image_ref);
        }
        Action::Remove => {
            let removed = client.remove_image(api::RemoveImageRequest { image }).await;
            removed.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(run(arguments))
}
