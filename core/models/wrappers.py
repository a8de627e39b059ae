"""Networks with flat tensor inputs and outputs in the order of their contracts.

Import this module only where torch is wanted: it imports torch at its top.
Floating-point inputs have the network's dtype; `timestep` may always be float32.
"""

from __future__ import annotations

from typing import Any

import torch

# DiagonalGaussianDistribution (diffusers/models/autoencoders/vae.py) clamps the logarithm of the
# variance to this range.
LOG_VARIANCE_MIN, LOG_VARIANCE_MAX = -30.0, 20.0


class TextEncoder(torch.nn.Module):
    """input_ids [batch, tokens] -> prompt_embeds [batch, tokens, width].

    The last hidden state after the final layer norm, as StableDiffusionPipeline.encode_prompt
    takes it with clip_skip=None; no attention mask.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.network(input_ids=input_ids).last_hidden_state
        return states


class MaskedTextEncoder(TextEncoder):
    """The same with attention_mask [batch, tokens], for configs with `use_attention_mask`."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        states: torch.Tensor = self.network(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        return states


class Denoiser(torch.nn.Module):
    """sample, timestep [batch], encoder_hidden_states -> model_output, shaped like sample."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        output: torch.Tensor = self.network(
            sample, timestep, encoder_hidden_states, return_dict=False
        )[0]
        return output


class GuidedDenoiser(Denoiser):
    """The same with timestep_cond [batch, guidance width]: the guidance embedding of an LCM."""

    def forward(  # type: ignore[override]
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep_cond: torch.Tensor,
    ) -> torch.Tensor:
        output: torch.Tensor = self.network(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            return_dict=False,
        )[0]
        return output


class GaussianEncoder(torch.nn.Module):
    """image [batch, 3, height, width] -> latent_mean, latent_std (AutoencoderKL, unscaled)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.encoder = network.encoder
        self.quant_conv = network.quant_conv

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moments = self.encoder(image)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = torch.chunk(moments, 2, dim=1)
        log_variance = torch.clamp(log_variance, LOG_VARIANCE_MIN, LOG_VARIANCE_MAX)
        return mean, torch.exp(0.5 * log_variance)


class GaussianDecoder(torch.nn.Module):
    """latent [batch, C, height/f, width/f] -> image (AutoencoderKL)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.post_quant_conv = network.post_quant_conv
        self.decoder = network.decoder

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        if self.post_quant_conv is not None:
            latent = self.post_quant_conv(latent)
        image: torch.Tensor = self.decoder(latent)
        return image


class TinyEncoder(torch.nn.Module):
    """image [batch, 3, height, width] -> latent (AutoencoderTiny)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.encoder = network.encoder

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        latent: torch.Tensor = self.encoder(image)
        return latent


class TinyDecoder(torch.nn.Module):
    """latent [batch, C, height/f, width/f] -> image (AutoencoderTiny, which clamps inside)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.decoder = network.decoder

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = self.decoder(latent)
        return image


class PreviewDecoder(TinyDecoder):
    """The same on a latent as the U-Net leaves it: the scaling factor is divided out inside."""

    def __init__(self, network: Any, scaling_factor: float) -> None:
        super().__init__(network)
        self.scaling_factor = scaling_factor

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return super().forward(latent if self.scaling_factor == 1 else latent / self.scaling_factor)
