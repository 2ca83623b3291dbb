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
}

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
    let image = Some(api::ImageSpec {
        image: arguments.image,
        runtime_handler: arguments.runtime_handler,
        ..api::ImageSpec::default()
    });
    match arguments.action {
        Action::Pull => {
            let pulled = client.pull_image(api::PullImageRequest { image }).await;
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
