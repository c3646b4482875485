//! Man pages and completions, from the definitions that the parser itself uses.

use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;
use crate::error::{Error, Result};

/// Writes what packages need.
#[derive(Debug, clap::Subcommand)]
pub enum Arguments {
    /// Writes the man pages, in section 1, to DIR.
    Man {
        /// An existing directory.
        dir: PathBuf,
    },
    /// Writes a shell's completions to standard output.
    Completions {
        /// Which shell.
        shell: Shell,
    },
}

impl Arguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn run(self) -> Result<()> {
        match self {
            Arguments::Man { dir } => man(&dir),
            Arguments::Completions { shell } => {
                clap_complete::generate(shell, &mut Cli::command(), "livemirror", &mut std::io::stdout());
                Ok(())
            }
        }
    }
}

fn man(dir: &Path) -> Result<()> {
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    let visible: Vec<_> = root.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned().collect();
    page(dir, "livemirror", root)?;
    for verb in visible {
        let name = format!("livemirror-{}", verb.get_name());
        page(dir, &name, verb.display_name(name.clone()))?;
    }
    Ok(())
}

fn page(dir: &Path, name: &str, command: clap::Command) -> Result<()> {
    let path = dir.join(format!("{name}.1"));
    let mut text = Vec::new();
    let page = clap_mangen::Man::new(command).title(name.to_uppercase()).section("1");
    let written = page.render(&mut text).and_then(|()| fs::write(&path, text));
    written.map_err(|error| Error::io("cannot write", &error).on(path.display().to_string()))
}
