"""From preferences and rewards to better answers: rollouts, rewards, advantages. Sources for the one loop."""
